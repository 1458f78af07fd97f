"""`python -m guardengine` is the `guardengine` command."""

import sys

from guardengine.cli.main import main

sys.exit(main())
