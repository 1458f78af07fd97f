"""SCHEMES: the quantization schemes of `guardengine verify-quantization`. Imports no torch, for the command line."""

from __future__ import annotations

from typing import Any

# The names of the schemes -> options of Engine.from_pretrained.
SCHEMES: dict[str, dict[str, Any]] = {
    "int8": {"quantization": "int8"},
    "w8a8": {"quantization": "w8a8"},
    "int8+kv-int8": {"quantization": "int8", "kv_dtype": "int8"},
    "w8a8+kv-int8": {"quantization": "w8a8", "kv_dtype": "int8"},
    "kv-int8": {"kv_dtype": "int8"},
}
