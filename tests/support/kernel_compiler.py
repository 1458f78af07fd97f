"""Compiles what operators launch, for GPUs that are not here, and reads what became of it.

`record` runs an operator on meta tensors and notes each launch with the specialization that Triton would choose for
those very arguments; `compile_all` compiles for a target; `measure` reads registers, spills, shared memory, matrix
instructions and the width of loads from the machine code; `complaints` says what is wrong with that.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import re
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.cache import triton_key
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction, create_function_from_signature

TRITON_VERSION = "3.7.1"
BUILD = Path(__file__).parents[2] / "build" / "gpu-kernels"
READER = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]  # another reader may read otherwise
NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

if triton.__version__ != TRITON_VERSION:
    raise RuntimeError(
        f"tests/support/kernel_compiler.py knows Triton {TRITON_VERSION}, not {triton.__version__}"
    )
if isinstance(triton.language.sum, InterpretedFunction):
    raise RuntimeError("TRITON_INTERPRET is set: kernels cannot be compiled in this process")


class Gpu(NamedTuple):
    """A target, a GPU that has it, and what a program may take of that."""

    target: GPUTarget
    num_sms: int
    max_shared: int  # bytes a program
    is_checked: bool = True  # or only recorded, for the curious
    most_spills: int = 0  # of a hot kernel, outside of loops: addresses that are parked while a loop runs


KIB = 1024
GPUS = {
    "sm_80": Gpu(GPUTarget("cuda", 80, 32), 108, 163 * KIB),  # A100
    "sm_86": Gpu(GPUTarget("cuda", 86, 32), 72, 99 * KIB, most_spills=8),  # A10
    "sm_90": Gpu(GPUTarget("cuda", 90, 32), 132, 227 * KIB),  # H100
    "sm_100": Gpu(GPUTarget("cuda", 100, 32), 148, 227 * KIB),  # B200
    "sm_120": Gpu(GPUTarget("cuda", 120, 32), 170, 99 * KIB, most_spills=8),  # RTX 5090
    "gfx942": Gpu(GPUTarget("hip", "gfx942", 64), 304, 64 * KIB, is_checked=False),  # MI300X
}


class Launch(NamedTuple):
    """One kernel with all that its machine code depends on."""

    source: ASTSource
    options: Any
    target: GPUTarget

    @property
    def key(self) -> str:
        return f"{self.source.hash()}-{self.options.hash()}-{self.target}"


class Measured(NamedTuple):
    """What became of a kernel."""

    registers: int  # a thread
    spills: int  # instructions that write or read spilled registers
    looped_spills: int  # those of them that are inside a loop
    stack: int  # bytes a thread
    shared: int  # bytes a program
    mma: dict[
        str, int
    ]  # matrix instructions by name: HMMA and IMMA are mma.sync, HGMMA wgmma, UTCHMMA tcgen05
    loads: dict[str, int]  # instructions that load from global memory, by bytes a thread


def record(operator: Callable[[], object], target: GPUTarget) -> list[Launch]:
    """Every launch that `operator` makes on meta tensors, where none can take place."""
    launches: list[Launch] = []

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append(specialize(kernel, args, kwargs, target))

    hip = "0" if target.backend == "hip" else None
    with patched(JITFunction, "run", run), patched(torch.version, "hip", hip):
        operator()
    return launches


@contextlib.contextmanager
def patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def specialize(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any], target: GPUTarget) -> Launch:
    """What JITFunction.run does before it compiles: types, constants and alignment of the arguments."""
    backend = make_backend(target)
    known = backend.parse_options({}).__dict__
    if target.backend != "cuda":  # options of NVIDIA's only
        kwargs = {key: value for key, value in kwargs.items() if key in known or key in kernel.arg_names}
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*args, **kwargs)
    options, signature, constants, attributes = kernel._pack_args(
        backend, kwargs, bound, specialization, options
    )
    return Launch(ASTSource(kernel, signature, constants, attributes), options, target)


_work: list[Launch] = []  # of the pool's processes, which are forks: a kernel cannot be pickled


def compile_all(launches: list[Launch], *, processes: int = 2) -> list[Measured]:
    """Compile and measure, each different launch once."""
    global _work
    different = {launch.key: launch for launch in launches}
    if processes == 1:
        return [measure(launch) for launch in launches]
    _work = list(different.values())
    triton_key()  # a hash of all of Triton: once, not once a process
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(processes, mp_context=fork) as pool:
        measured = dict(zip(different, pool.map(_compile_number, range(len(_work))), strict=True))
    return [measured[launch.key] for launch in launches]


def _compile_number(number: int) -> Measured:
    return measure(_work[number])


def measure(launch: Launch) -> Measured:
    """Compile one launch and read its machine code, or what an earlier run read."""
    os.environ["TRITON_CACHE_DIR"] = str(BUILD / "triton")
    compiled = triton.compile(launch.source, target=launch.target, options=launch.options.__dict__)
    known = BUILD / "measured" / f"{compiled.hash}-{READER}.json"
    if known.exists():
        return Measured(**json.loads(known.read_text()))
    read = measure_nvidia if launch.target.backend == "cuda" else measure_amd
    measured = read(compiled)
    known.parent.mkdir(parents=True, exist_ok=True)
    partial = known.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(measured._asdict()))
    partial.rename(known)
    return measured


def measure_nvidia(compiled: Any) -> Measured:
    path = BUILD / f"{os.getpid()}.cubin"
    path.write_bytes(compiled.asm["cubin"])
    try:
        usage = _tool("cuobjdump", "--dump-resource-usage", path)
        code = _tool("nvdisasm", "-c", path)
    finally:
        path.unlink()
    used = {name: int(value) for name, value in re.findall(r"\b(REG|STACK):(\d+)", usage)}
    instructions = read_sass(code)
    names = [instruction.partition(".")[0] for instruction, _ in instructions]
    if "EXIT" not in names:
        raise RuntimeError("nvdisasm printed no code that is understood")
    spills = [
        in_loop for name, (_, in_loop) in zip(names, instructions, strict=True) if name in ("STL", "LDL")
    ]
    loads: Counter[str] = Counter()
    for name, (instruction, _) in zip(names, instructions, strict=True):
        if name in ("LDG", "LDGSTS"):
            loads[_bytes_of(instruction)] += 1
        elif name == "UTMALDG":
            loads["bulk"] += 1
    return Measured(
        used["REG"],
        len(spills),
        sum(spills),
        used["STACK"],
        compiled.metadata.shared,
        dict(sorted(Counter(name for name in names if name.endswith("MMA")).items())),
        dict(sorted(loads.items())),
    )


def read_sass(code: str) -> list[tuple[str, bool]]:
    """Instructions as nvdisasm prints them, each with whether a branch back to before it comes after it."""
    found: list[str] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for line in code.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(found)
        elif match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)", line):
            target = re.search(r"`\((\.L_\w+)\)", match[2])
            if match[1].startswith("BRA") and target and target[1] in labels:
                loops.append((labels[target[1]], len(found)))
            found.append(match[1])
    # The last instruction of a program branches to itself.
    return [(name, any(first <= i <= last for first, last in loops)) for i, name in enumerate(found)]


def _bytes_of(load: str) -> str:
    """Of LDG.E.128.CONSTANT "16"; without a width it is 4."""
    parts = load.split(".")
    for part, size in (
        ("256", "32"),
        ("128", "16"),
        ("64", "8"),
        ("U16", "2"),
        ("S16", "2"),
        ("U8", "1"),
        ("S8", "1"),
    ):
        if part in parts:
            return size
    return "4"


def measure_amd(compiled: Any) -> Measured:
    code = compiled.asm["amdgcn"]

    def number(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", code)[1])

    widths = {"dwordx4": "16", "dwordx3": "12", "dwordx2": "8", "dword": "4", "ushort": "2", "ubyte": "1"}
    loads = Counter(
        widths[width]
        for width in re.findall(
            r"^\s+(?:global|buffer)_load_(dword(?:x\d)?|ushort|ubyte)", code, re.MULTILINE
        )
    )
    mma = Counter(re.findall(r"^\s+(v_mfma)_", code, re.MULTILINE))
    spills = number("vgpr_spill_count") + number("sgpr_spill_count")
    return Measured(
        number("vgpr_count"),
        spills,
        spills,  # where they are is not looked at
        number("private_segment_fixed_size"),
        compiled.metadata.shared,
        dict(mma),
        dict(sorted(loads.items())),
    )


def _tool(name: str, *arguments: object) -> str:
    command = [str(NVIDIA_TOOLS / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def complaints(
    measured: Measured, gpu: Gpu, *, hot: bool, needs_mma: bool, before: dict[str, Any] | None = None
) -> list[str]:
    """What is wrong with a kernel by itself, and against what was recorded of it."""
    found = []
    if measured.shared > gpu.max_shared:
        found.append(
            f"takes {measured.shared} bytes of shared memory of {gpu.max_shared}: it cannot be launched"
        )
    if hot and (measured.looped_spills or measured.spills > gpu.most_spills):
        found.append(
            f"spills registers in {measured.spills} instructions, {measured.looped_spills} of them in loops"
        )
    if needs_mma and not measured.mma:
        found.append("has no matrix instruction")
    if before is None:
        return found
    for name in ("registers", "spills", "looped_spills", "stack", "shared"):
        now, then = getattr(measured, name), before[name]
        if now > then:
            found.append(f"{name} grew from {then} to {now}")
    if measured.mma.keys() != before["mma"].keys():
        found.append(
            f"matrix instructions were {[*before['mma']]}, now {[*measured.mma]}: sums may round otherwise"
        )
    if is_wide(before["loads"]) and not is_wide(measured.loads):
        found.append(f"no longer loads 16 bytes at a time: {before['loads']} became {measured.loads}")
    return found


def is_wide(loads: dict[str, int]) -> bool:
    return bool(loads.keys() & {"16", "32", "bulk"})
