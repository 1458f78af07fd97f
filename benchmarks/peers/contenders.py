"""Who can be compared: for each peer and setting the worker's script, its interpreter, the model file it wants and what
its floor counts. Starts nothing but conversions."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from ctypes.util import find_library
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import environments
from causal_lm import write_causal_lm

from guardengine.errors import ConfigError
from guardengine.extras import how_to_install

Arithmetic = Literal["float32", "bfloat16", "int8"]
ENGINE_DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
_CONVERSION_S = 1800
_HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Contender:
    """One engine with one setting, as the command line names it."""

    name: str  # "engine:bf16", "llamacpp:q8_0"
    script: str
    model: str  # which form of the weights
    options: Mapping[str, Any]  # for the worker's `load`
    weight_bytes: int = 2  # a value; scales are left out: a floor stays a floor
    kv_bytes: int = 2
    arithmetic: Arithmetic = "bfloat16"
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def peer(self) -> str:
        return self.name.partition(":")[0]


def _peer(peer: str, setting: str, model: str, **fields: Any) -> Contender:
    known = {
        key: fields.pop(key)
        for key in ("weight_bytes", "kv_bytes", "arithmetic", "environment")
        if key in fields
    }
    return Contender(f"{peer}:{setting}", f"worker_{peer}.py", model, fields, **known)


# Without bf16 instructions torch's bf16 is slower than its float32, which then is the better setting.
_FP32 = {"dtype": "float32", "weight_bytes": 4, "kv_bytes": 4, "arithmetic": "float32"}
_BF16 = {"dtype": "bfloat16"}
_SLEEPY = {"environment": {"KMP_BLOCKTIME": "1"}}  # libiomp's threads spin no longer than a millisecond
_INT8 = {"weight_bytes": 1, "arithmetic": "int8"}
# Of a peer named without a setting, all are run but those marked here.
_ONLY_WHEN_NAMED = {
    "openvino:f16-kv8",
    "openvino:int8-kv8",
    "vllm:eager-fp32",
    "hf:sdpa-fp32",
    "hf:batch-fp32",
}
_ALL = (
    _peer("llamacpp", "bf16", "bf16.gguf", flash_attention=True),
    _peer("llamacpp", "bf16-nofa", "bf16.gguf", flash_attention=False),
    _peer("llamacpp", "q8_0", "q8_0.gguf", flash_attention=True, **_INT8),
    _peer("llamacpp", "q8_0-nofa", "q8_0.gguf", flash_attention=False, **_INT8),
    _peer("openvino", "f16", "openvino-f16", kv_precision="f16"),
    _peer("openvino", "f16-kv8", "openvino-f16", kv_precision="u8"),
    _peer("openvino", "int8", "openvino-int8", kv_precision="f16", **_INT8),
    _peer("openvino", "int8-kv8", "openvino-int8", kv_precision="u8", **_INT8),
    _peer("vllm", "eager", "causal-lm", eager=True, **_BF16, **_SLEEPY),
    _peer("vllm", "eager-fp32", "causal-lm", eager=True, **_FP32, **_SLEEPY),
    _peer("vllm", "compiled", "causal-lm", eager=False, **_BF16, **_SLEEPY),
    _peer("hf", "sdpa", "checkpoint", variant="sdpa", **_BF16),
    _peer("hf", "sdpa-fp32", "checkpoint", variant="sdpa", **_FP32),
    _peer("hf", "eager", "checkpoint", variant="eager", **_BF16),
    _peer("hf", "batch", "checkpoint", variant="batch", **_BF16),
    _peer("hf", "batch-fp32", "checkpoint", variant="batch", **_FP32),
)
PEERS = {contender.name: contender for contender in _ALL}


def choose_peers(text: str) -> list[Contender]:
    """Read "llamacpp,openvino:int8": a peer means all of its settings. Raises ConfigError."""
    chosen: list[Contender] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        found = [PEERS[part]] if part in PEERS else []
        if not found:
            found = [c for c in _ALL if c.peer == part and c.name not in _ONLY_WHEN_NAMED]
        if not found:
            raise ConfigError(
                f"peer {part!r} is unknown; the peers are {', '.join(PEERS)}, or without a setting"
            )
        chosen += [contender for contender in found if contender not in chosen]
    if not chosen:
        raise ConfigError("no peer was named; give --peers, such as llamacpp,openvino")
    return chosen


def choose_engine(name: str) -> Contender:
    """The engine as "bf16" or "fp32", or with any `quantization` that Engine.from_pretrained knows, on bfloat16."""
    dtype = ENGINE_DTYPES.get(name, "bfloat16")
    item_bytes = 4 if dtype == "float32" else 2
    return Contender(
        f"engine:{name}",
        "worker_engine.py",
        "checkpoint",
        {"dtype": dtype, "quantization": None if name in ENGINE_DTYPES else name},
        weight_bytes=item_bytes if name in ENGINE_DTYPES else 1,
        kv_bytes=item_bytes,
        arithmetic="float32" if dtype == "float32" else "int8" if name == "w8a8" else "bfloat16",
    )


@dataclass(frozen=True, slots=True)
class Place:
    """Where things are: the Stream checkpoint, the converted models, an interpreter for each peer."""

    checkpoint: Path
    models: Path
    interpreters: Mapping[str, Path]

    def interpreter(self, contender: Contender) -> Path:
        """Raises ConfigError, naming the set-up, where there is none."""
        if contender.peer in ("engine", "hf"):
            return Path(sys.executable)
        python = self.interpreters.get(contender.peer) or environments.interpreter(contender.peer)
        if not python.exists():
            raise ConfigError(
                f"{python} does not exist; run `python benchmarks/peers/setup.py {contender.peer}`, or name another "
                f"interpreter with --{contender.peer}-python"
            )
        return python

    def command(self, contender: Contender) -> Sequence[str]:
        return [str(self.interpreter(contender)), "-u", str(_HERE / contender.script)]

    def environment(self, contender: Contender) -> dict[str, str]:
        """Variables for the worker. vLLM's manual wants libiomp, which comes with it, and tcmalloc loaded first."""
        found = dict(contender.environment)
        if contender.peer == "vllm":
            openmp = self.interpreter(contender).parents[1] / "lib" / "libiomp5.so"
            preloads = [str(openmp)] if openmp.exists() else []
            preloads += [name] if (name := find_library("tcmalloc_minimal")) else []
            found["LD_PRELOAD"] = ":".join(preloads)
        return found

    def model(self, contender: Contender) -> Path:
        """The weights in the form that the contender reads, made on first use. Raises ConfigError."""
        if contender.model == "checkpoint":
            return self.checkpoint
        folder = write_causal_lm(self.checkpoint, self.models / "causal-lm")
        target = self.models / contender.model
        if contender.model.endswith(".gguf"):
            try:
                from gguf_file import write_gguf
            except ImportError as error:
                raise ConfigError(
                    f"GGUF files cannot be written ({error}); {how_to_install('peers')}"
                ) from error
            return write_gguf(folder, target, contender.model.removesuffix(".gguf"))
        if contender.model.startswith("openvino-") and not target.exists():
            self._convert_openvino(contender, folder, target)
        return target

    def _convert_openvino(self, contender: Contender, folder: Path, target: Path) -> None:
        weights = contender.model.removeprefix("openvino-")
        parts = (self.interpreter(contender), _HERE / "convert_openvino.py", folder, target, weights)
        command = [str(part) for part in parts]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_CONVERSION_S, check=False)
        except subprocess.TimeoutExpired:
            raise ConfigError(f"converting to {target} took more than {_CONVERSION_S} s") from None
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise ConfigError(f"converting to {target} failed with status {done.returncode}: {reason[:300]}")
