"""How each of a layer's matrices is multiplied on a GPU: measured at the first start, then kept in a file.

What is fastest decides in which order sums are added. Measured anew at every start it could differ from one to the
next, and with it the last bits of every label.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from guardengine.checkpoint.weights import Weights
from guardengine.runners.accelerator import Accelerator
from guardengine.runners.operators import FusedOperators

logger = logging.getLogger("guardengine")

_ROWS = (1, 16, 64)  # of the steps that a choice is measured over


def matrix_configs(
    ops: FusedOperators, weights: Weights, accelerator: Accelerator
) -> dict[tuple[str, tuple[int, int]], Any]:
    """How each matrix of a layer is multiplied.

    By rule where the device cannot be timed. Measuring takes about a minute, most of it compiling.

    Args:
        ops: The backend, which measures.
        weights: Not quantized.
        accelerator: Their device.

    Returns:
        (operator, shape) -> configuration, in the backend's own form.
    """
    layer, dtype = weights.layers[0], weights.embed.dtype
    wanted = (
        ("norm_linear", layer.qkv),
        ("linear_add", layer.o),
        ("norm_gate_up", layer.gate_up),
        ("linear_add", layer.down),
    )
    shapes = [
        (operator, (weight.shape[0], weight.shape[1]))
        for operator, weight in wanted
        if isinstance(weight, Tensor)  # none is quantized here
    ]
    num_sms = accelerator.num_cores
    rule = {key: ops.default_config(*key, dtype=dtype, num_sms=num_sms) for key in shapes}
    if not accelerator.can_time:
        return rule
    path = tuned_file()
    kept = _read(path)
    chosen, started = {}, time.perf_counter()
    for operator, shape in shapes:
        name = " ".join((_device_name(accelerator), str(dtype), operator, "x".join(map(str, shape))))
        found = _config(ops, kept.get(name))
        if found is None:
            try:
                found = ops.tune(
                    operator,
                    shape,
                    dtype,
                    _ROWS,
                    ops.measure_graph,
                    device=accelerator.device,
                    num_sms=num_sms,
                )
            except Exception as error:
                logger.warning("%s: not measured (%s), chosen by rule", name, error)
                chosen[operator, shape] = rule[operator, shape]
                continue
            kept[name] = dataclasses.asdict(found)
            _write(path, kept)
            logger.info("%s: %s, after %.0f s of measuring", name, found, time.perf_counter() - started)
        chosen[operator, shape] = found
    return chosen


def tuned_file() -> Path:
    """Where choices are kept: in $GUARDENGINE_CACHE, or ~/.cache/guardengine."""
    folder = os.environ.get("GUARDENGINE_CACHE")
    return (Path(folder).expanduser() if folder else Path.home() / ".cache" / "guardengine") / "triton.json"


def _device_name(accelerator: Accelerator) -> str:
    versions = [f"{name} {metadata.version(name)}" for name in ("torch", "triton")]
    return ", ".join([torch.cuda.get_device_name(accelerator.device), *versions])


def _config(ops: FusedOperators, kept: object) -> Any:
    """A kept choice, or None where the file holds something else."""
    names = [field.name for field in dataclasses.fields(ops.LinearConfig)]
    if not isinstance(kept, dict) or sorted(kept) != sorted(names):
        return None
    if not all(type(value) is int and 1 <= value <= 1024 for value in kept.values()):
        return None
    return ops.LinearConfig(**kept)


def _read(path: Path) -> dict[str, Any]:
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}


def _write(path: Path, kept: dict[str, Any]) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        logger.warning(
            "%s cannot be written (%s): the GPU will be measured again at the next start", path, error
        )
