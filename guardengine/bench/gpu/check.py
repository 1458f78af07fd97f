"""`python -m guardengine.bench.gpu.check`: the first thing to run on a machine with a GPU (`make gpu-check`).

In under ten minutes it compares every kernel and the whole engine with the reference, runs compute-sanitizer where it
is installed, and measures step times beside transformers, vLLM and SGLang where these are installed. It writes one
JSON record and one Markdown table; a section that fails says so and does not stop the others. Without a GPU it ends
with status 2. `--interpret` runs the same logic on tiny shapes in Triton's interpreter, which says nothing about a
GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

_SECTIONS = ("device", "operators", "engine", "sanitizer", "speed", "transformers", "vllm", "sglang")
_DTYPES = ("bfloat16", "float16", "float32")
_MINUTES = 10.0
_SANITIZER_TOOLS = ("memcheck", "racecheck", "synccheck")


@dataclass(slots=True)
class Check:
    """The options of a check, and the problems that it has found."""

    interpret: bool
    preset: str
    dtypes: tuple[str, ...]
    rows: tuple[int, ...]
    streams: tuple[int, ...]
    contexts: tuple[int, ...]
    steps: int
    deadline: float
    sanitize: bool = True
    problems: list[str] = field(default_factory=list)

    @property
    def device(self) -> str:
        return "cpu" if self.interpret else "cuda"

    def problem(self, text: str) -> None:
        self.problems.append(text)
        _say(f"  DIFFERS: {text}")


def check_device(check: Check) -> dict[str, Any]:
    """The GPU, its driver, and the versions of the software."""
    import torch

    from guardengine.bench.gpu import speed as gpu_speed
    from guardengine.measuring import machine

    found: dict[str, Any] = {"machine": machine.machine_stamp()}
    found |= {name: _version(name) for name in ("triton", "transformers", "vllm", "sglang")}
    if not check.interpret:
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "copy_bytes_per_s": gpu_speed.copy_bytes_per_s(),
            "driver": _output(
                "nvidia-smi", "--query-gpu=driver_version,clocks.max.sm", "--format=csv,noheader"
            ),
        }
    return found


def check_operators(check: Check) -> dict[str, Any]:
    """Compare every operator with the reference."""
    import torch

    from guardengine.bench.gpu import parity as gpu_parity
    from guardengine.checkpoint.random_weights import preset_config
    from guardengine.kernels import load
    from guardengine.runners.accelerator import choose_accelerator

    config = preset_config(check.preset)
    shape = gpu_parity.Shape(
        config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim, config.intermediate_size,
        config.heads.inner_size if config.heads else 0,
    )  # fmt: skip
    target = choose_accelerator(torch.device(check.device))
    found = []
    for dtype in check.dtypes:
        with torch.inference_mode(), target.activate():
            for row in gpu_parity.check_operators(
                load("triton"), target.device, shape, getattr(torch, dtype), list(check.rows), target.num_cores
            ):  # fmt: skip
                found.append(row._asdict())
                if not row.is_ok:
                    bits = "; a row's bits depend on its company" if row.same_bits is False else ""
                    check.problem(
                        f"{row.operator}, {row.rows} rows of {row.dtype}: error {row.error:.2e}, allowed "
                        f"{row.limit:.2e}{bits}"
                    )
    return {"cases": found, "failed": sum(not row["is_ok"] for row in found)}


def check_engine(check: Check) -> dict[str, Any]:
    """Compare whole streams with the reference backend on the same device, and with the same streams fed in other
    chunks."""
    from guardengine.bench.checkpoints import cached_checkpoint
    from guardengine.bench.gpu import streams as gpu_streams

    folder = cached_checkpoint(check.preset, progress=not check.interpret)
    found = {}
    for dtype in check.dtypes:
        for kv_dtype in ("auto",) if check.interpret else ("auto", "int8"):
            name = dtype if kv_dtype == "auto" else f"{dtype}, int8 cache"
            row = gpu_streams.check_streams(
                folder, check.device, dtype, kv_dtype=kv_dtype, is_tiny=check.interpret
            )
            found[name] = row
            for problem in row["problems"]:
                check.problem(f"engine in {name}: {problem}")
    return found


def check_sanitizer(check: Check) -> dict[str, Any]:
    """Run the operators under compute-sanitizer: memory errors, races in shared memory, wrong barriers. cuBLAS' own
    kernels are left out, because it does not support their barriers."""
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None or check.interpret:
        return {"left_out": "compute-sanitizer is not installed" if tool is None else "there is no GPU"}
    found: dict[str, Any] = {}
    for name in _SANITIZER_TOOLS:
        command = [
            tool, "--tool", name, "--error-exitcode", "99", "--kernel-name", "kns=_kernel", sys.executable, "-P", "-m",
            "guardengine.bench.gpu.check", "--only", "operators", "--preset", "stream-tiny", "--rows", "3,33,70",
            "--dtypes", "bfloat16",
        ]  # fmt: skip
        left = max(30.0, min(120.0, check.deadline - time.perf_counter()))
        try:
            run = subprocess.run(command, capture_output=True, text=True, timeout=left, check=False)
        except subprocess.TimeoutExpired:
            found[name] = {"left_out": f"took more than {left:.0f} s"}
            continue
        found[name] = {"status": run.returncode, "output": (run.stdout + run.stderr)[-2000:]}
        if run.returncode:
            check.problem(f"compute-sanitizer {name}: status {run.returncode}")
    return found


def check_speed(check: Check) -> dict[str, Any]:
    """Step times of the engine."""
    return {"rows": _speed(check, "engine_steps", check.streams, backend="triton", say=_say)}


def check_transformers(check: Check) -> dict[str, Any]:
    """Step times of transformers, for few streams, because it takes them in turn."""
    few = tuple(count for count in check.streams if count <= 16)
    return {"rows": _speed(check, "transformers_steps", few)}


def _speed(check: Check, function: str, streams: tuple[int, ...], **options: Any) -> list[dict[str, Any]]:
    from guardengine.bench.checkpoints import cached_checkpoint
    from guardengine.bench.gpu import speed as gpu_speed
    from guardengine.checkpoint.random_weights import preset_config

    rows: list[dict[str, Any]] = getattr(gpu_speed, function)(
        cached_checkpoint(check.preset, progress=not check.interpret),
        preset_config(check.preset),
        gpu_speed.points(streams, check.contexts),
        device=check.device,
        dtype=check.dtypes[0],
        steps=check.steps,
        deadline=check.deadline,
        **options,
    )
    return rows


def _check_peer(name: str) -> Callable[[Check], dict[str, Any]]:
    def check_peer(check: Check) -> dict[str, Any]:
        """Step times of another engine on a causal model of the same backbone."""
        if importlib.util.find_spec(name) is None or check.interpret:
            return {"left_out": f"{name} is not installed" if not check.interpret else "there is no GPU"}
        from guardengine.bench.gpu import speed as gpu_speed
        from guardengine.checkpoint.random_weights import make_checkpoint, preset_config

        preset = check.preset.replace("stream-", "gen-")
        folder = Path(os.environ.get("GUARDENGINE_CACHE", Path.home() / ".cache" / "guardengine")) / preset
        if not folder.exists():
            make_checkpoint(folder, preset)
        points = [point for point in gpu_speed.points(check.streams, check.contexts) if point[0] <= 64]
        steps = getattr(gpu_speed, f"{name}_steps")
        return {"rows": steps(folder, preset_config(preset).vocab_size, points, check.steps)}

    return check_peer


_CHECKS: dict[str, Callable[[Check], dict[str, Any]]] = {
    "device": check_device,
    "operators": check_operators,
    "engine": check_engine,
    "sanitizer": check_sanitizer,
    "speed": check_speed,
    "transformers": check_transformers,
    "vllm": _check_peer("vllm"),
    "sglang": _check_peer("sglang"),
}


def run(check: Check, sections: Sequence[str]) -> dict[str, Any]:
    """Run sections one after another. Returns the record."""
    record: dict[str, Any] = {
        "kind": "gpu-check" + (" in the interpreter: not a measurement" if check.interpret else ""),
        "preset": check.preset,
        "sections": {},
    }
    for name in sections:
        _say(f"{name}: {(_CHECKS[name].__doc__ or name).strip().splitlines()[0]}")
        started = time.perf_counter()
        if started > check.deadline:
            found: dict[str, Any] = {"left_out": "no time was left"}
        else:
            try:
                found = _CHECKS[name](check)
            except Exception as error:  # whatever it is, the other sections still have something to say
                found = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
                check.problem(f"{name} failed: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
        found["seconds"] = round(time.perf_counter() - started, 1)
        record["sections"][name] = found
    record["problems"] = check.problems
    return record


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the check. Returns the exit status: 0; 1 when something differs or failed; 2 when there is no GPU."""
    options = _parse(sys.argv[1:] if arguments is None else arguments)
    if options.interpret:
        if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
            _say("gpu-check: Triton was imported before TRITON_INTERPRET=1 was set")
            return 2
        os.environ["TRITON_INTERPRET"] = "1"
    from guardengine.bench.gpu import report as gpu_report
    from guardengine.errors import ConfigError, GuardEngineError
    from guardengine.runners import accelerator

    try:
        if not options.interpret:
            accelerator.check_capability(accelerator.parse_device("cuda"))
            accelerator.check_triton()
            if accelerator.is_interpreted():
                raise ConfigError("TRITON_INTERPRET is set: unset it, or pass --interpret")
    except GuardEngineError as error:
        _say(f"gpu-check: there is no GPU to check: {error}")
        return 2
    check = _check_of(options)
    record = run(check, options.only)
    text = gpu_report.markdown(record)
    print(text)
    if options.json:
        gpu_report.write(options.json, record)
    if options.markdown:
        options.markdown.write_text(text, encoding="utf-8")
    return 1 if check.problems else 0


def _check_of(options: argparse.Namespace) -> Check:
    tiny = options.interpret
    return Check(
        interpret=options.interpret,
        preset=options.preset or ("stream-tiny" if tiny else "stream-0.6b"),
        dtypes=options.dtypes or (("float32",) if tiny else ("bfloat16", "float32")),
        rows=options.rows or ((1, 3) if tiny else (1, 2, 5, 16, 17, 33, 64, 100, 700)),
        streams=options.streams or ((2,) if tiny else (1, 16, 64, 256)),
        contexts=options.contexts or ((5,) if tiny else (256, 1024, 4096, 8192)),
        steps=options.steps or (2 if tiny else 50),
        deadline=time.perf_counter() + 60 * options.minutes,
    )


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    def numbers(text: str) -> tuple[int, ...]:
        values = tuple(int(part) for part in text.split(",") if part.strip().isdecimal())
        if not values or len(values) != text.count(",") + 1 or min(values) < 1:
            raise argparse.ArgumentTypeError(
                f"{text!r}: whole numbers above 0, separated by commas, are needed"
            )
        return values

    def sections(text: str) -> list[str]:
        chosen = text.split(",")
        if unknown := set(chosen) - set(_SECTIONS):
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: choose from {', '.join(_SECTIONS)}")
        return chosen

    def dtypes(text: str) -> tuple[str, ...]:
        chosen = tuple(text.split(","))
        if unknown := set(chosen) - set(_DTYPES):
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: choose from {', '.join(_DTYPES)}")
        return chosen

    parser = argparse.ArgumentParser(
        prog="python -m guardengine.bench.gpu.check",
        description="Check and time the triton backend on this GPU.",
    )
    parser.add_argument(
        "--interpret", action="store_true", help="run the logic in Triton's interpreter instead"
    )
    parser.add_argument(
        "--only", type=sections, default=list(_SECTIONS), metavar="SECTION,...", help=", ".join(_SECTIONS)
    )
    parser.add_argument("--preset", help="random weights of this size (stream-0.6b)")
    parser.add_argument(
        "--dtypes",
        type=dtypes,
        metavar="DTYPE,...",
        help="default bfloat16,float32; float16 is the operators' only",
    )
    parser.add_argument("--rows", type=numbers, metavar="N,N,...", help="of the operators that are checked")
    parser.add_argument("--streams", type=numbers, metavar="N,N,...", help="default 1,16,64,256")
    parser.add_argument("--contexts", type=numbers, metavar="N,N,...", help="default 256,1024,4096,8192")
    parser.add_argument("--steps", type=int, metavar="N", help="timed at each point, default 50")
    parser.add_argument(
        "--minutes", type=float, default=_MINUTES, help="start nothing after this (%(default)g)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables")
    return parser.parse_args(arguments)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() or None


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
