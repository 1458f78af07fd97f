"""Make the virtual environments of the peers: `python benchmarks/peers/setup.py llamacpp openvino vllm`.

llama.cpp is compiled for this processor, which takes some minutes. transformers (`hf`) runs in guardengine's own
environment and needs nothing beyond the extra `peers`. Standard library only.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence

from environments import RECIPES, set_up


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 1 when a peer could not be set up; the others are then set up all the same."""
    parser = argparse.ArgumentParser(prog="python benchmarks/peers/setup.py", description=__doc__)
    parser.add_argument("peers", nargs="+", choices=tuple(RECIPES), metavar="PEER", help=", ".join(RECIPES))
    status = 0
    for peer in dict.fromkeys(parser.parse_args(arguments).peers):
        try:
            print(f"{peer}: {set_up(peer)}", flush=True)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"{peer}: not set up: {error}", file=sys.stderr, flush=True)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
