"""The model's operators, one module per backend; a module is the interface, there are no classes.

Every backend defines the same functions with the same signatures and contracts as `reference`, which states
each formula in plain PyTorch and is the specification that the others are tested against.

Dimension key, used in every shape comment of this package and of the engine:
    T tokens (rows) in a batch    W rows whose label is wanted    B streams in a batch
    E hidden size                 F intermediate size             V vocabulary
    H query heads                 Hkv key/value heads             D head dimension
    N blocks in the KV cache      S tokens per block              M blocks per block table
    G inner size of the guard heads    C logits per row: response risk | response category | query risk | query category
A slot is one token's place in the KV cache: slot = block * S + offset.
"""

from __future__ import annotations

import importlib
from types import ModuleType

# Names of backends and their modules here. A folder called `triton` could be taken for the package.
_MODULES = {"reference": "reference", "cpu": "cpu", "triton": "gpu"}
BACKENDS = tuple(_MODULES)
SMALL_ROWS = 64  # of a step, up to which a backend's fused operators take it
OPERATORS = (
    "fused_add_rms_norm",
    "guard_heads",
    "linear",
    "paged_attention",
    "qk_norm_rope_store_kv",
    "quantize",
    "rms_norm",
    "rope_table",
    "silu_and_mul",
)


def load(backend: str) -> ModuleType:
    """Import one backend's operators. Raises KeyError for a name that is not in `BACKENDS`."""
    return importlib.import_module(f"{__name__}.{_MODULES[backend]}")


def backend_of(ops: ModuleType) -> str:
    """The name of the backend whose operators these are."""
    module = ops.__name__.rpartition(".")[2]
    return next(name for name, of_backend in _MODULES.items() if of_backend == module)
