"""Install a wheel into a fresh environment that sees no compiler, and guard a conversation with it.

    python check_wheel.py dist/guardengine-*.whl [options for pip]

What follows the wheel goes to pip, as --extra-index-url.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import venv
from pathlib import Path

GUARD = """
import sys
from pathlib import Path

import guardengine
from guardengine import Engine
from guardengine.checkpoint.random_weights import make_checkpoint

assert Path(guardengine.__file__).is_relative_to(sys.prefix), guardengine.__file__
folder = make_checkpoint(Path(sys.argv[1]), "stream-tiny", vocab_size=512)
with Engine.from_pretrained(folder, backend="cpu", kv_cache_bytes=2**22, num_threads=2) as engine:
    stream = engine.open(token_ids=list(range(100, 140)))
    stream.append(range(140, 180))
    labels = engine.run()
    assert stream.prompt_label is not None and len(stream.labels) >= 40, stream.labels
    print(engine.stats()["isa"], stream.prompt_label.risk, stream.verdict)
"""


def main(wheel: Path, pip_options: list[str]) -> None:
    """Raises CalledProcessError when the wheel does not install or does not run."""
    tag = wheel.stem.split("-")[-3:]
    if tag[:2] != ["py3", "none"] or "linux_" in tag[2].replace("manylinux_", ""):
        raise SystemExit(f"{wheel.name}: the tag is not py3-none-<a platform that others have>")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        venv.create(folder / "venv", with_pip=True, symlinks=True)
        python = folder / "venv/bin/python"
        environment = {"PATH": str(python.parent), "HOME": temporary}
        pip = [
            python,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--only-binary",
            ":all:",
            *pip_options,
            f"{wheel.resolve()}[engine]",
        ]
        for command in (pip, [python, "-P", "-c", GUARD, folder / "checkpoint"]):
            subprocess.run(command, env=environment, cwd=folder, check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
