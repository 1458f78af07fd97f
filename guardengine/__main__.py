"""`python -m guardengine` is the `guardengine` command."""

import sys

from guardengine.cli import main

sys.exit(main())
