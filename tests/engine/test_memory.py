"""collect_rarely(): in a process of its own, as it is for a whole process."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import gc
from guardengine import collect_rarely
made = [[] for _ in range(1000)]
collect_rarely()
print(gc.get_freeze_count() > 1000, gc.get_threshold()[0] > 700, gc.isenabled())
a = []; a.append(a); del a  # garbage that only the collector frees is freed still
print(gc.collect() >= 1)
"""


def test_what_was_there_is_left_alone() -> None:
    found = subprocess.run([sys.executable, "-P", "-c", CODE], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["True", "True", "True", "True"]
