"""Triton kernels compiled for GPUs that are not here. A process of its own: TRITON_INTERPRET must not be set.

python -P -m pytest tests/aot            (make test-gpu-compiled)
python -P -m pytest tests/aot --record   (make gpu-kernels: what is compiled now becomes the record)
"""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--record", action="store_true", help="rewrite benchmarks/results/gpu-kernels.json and its page"
    )
