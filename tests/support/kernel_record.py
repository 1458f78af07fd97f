"""What every kernel compiled to when it was last looked at: read, compared, written, rendered for people."""

from __future__ import annotations

import ast
import hashlib
import json
from pathlib import Path
from typing import Any

from compiled_kernels import Compiled, configurations
from kernel_compiler import GPUS, TRITON_VERSION, Gpu, Measured, compile_all, complaints, is_wide, record

from guardengine.kernels.gpu import WIDE_MMA

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "benchmarks" / "results" / "gpu-kernels.json"
PAGE = ROOT / "docs" / "reference" / "gpu-kernels.md"

Table = dict[str, dict[str, list[Measured]]]  # gpu -> configuration -> its launches


def listed(gpu: str) -> list[Compiled]:
    """The configurations in use on a GPU like this one. Names are unique."""
    target = GPUS[gpu].target
    wide_mma = target.backend == "cuda" and target.arch // 10 in WIDE_MMA
    found = configurations(GPUS[gpu].num_sms, wide_mma=wide_mma)
    names = [configuration.name for configuration in found]
    if len(set(names)) < len(names):
        raise ValueError(
            f"two configurations have one name: {sorted({n for n in names if names.count(n) > 1})}"
        )
    return found


def compile_listed(gpus: list[str]) -> Table:
    """Every configuration for these GPUs, in one pool of processes."""
    recorded = [
        (gpu, configuration.name, launch)
        for gpu in gpus
        for configuration in listed(gpu)
        for launch in record(configuration.launch, GPUS[gpu].target)
    ]
    table: Table = {gpu: {} for gpu in gpus}
    results = compile_all([launch for _, _, launch in recorded])
    for (gpu, name, _), measured in zip(recorded, results, strict=True):
        table[gpu].setdefault(name, []).append(measured)
    return table


def load() -> dict[str, Any]:
    """gpu -> configuration -> launches, as recorded; nothing where nothing is recorded for this Triton."""
    content = _content()
    return content["gpus"] if content["triton"] == TRITON_VERSION else {}


def _content() -> dict[str, Any]:
    if not RECORD.exists():
        return {"triton": None, "sources": None, "gpus": {}}
    content: dict[str, Any] = json.loads(RECORD.read_text())
    return content


def sources() -> str:
    """Digest of all that decides what kernels compile to, but for Triton: the code of their files, and of the one that
    compiles. Comments and docstrings are not code."""
    digest = hashlib.sha256()
    for file in [
        *sorted((ROOT / "kernels").rglob("*.py")),
        ROOT / "tests" / "support" / "kernel_compiler.py",
    ]:
        digest.update(f"{file.relative_to(ROOT)}\0{_code(file)}\0".encode())
    return digest.hexdigest()


def _code(file: Path) -> str:
    """A file's source in Python's own format, without comments and docstrings."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            node.body[0] = ast.Pass()
    return ast.unparse(tree)


def is_of_these_sources() -> bool:
    """Whether the record was made of the kernels as they are, so that compiling them again could only repeat it."""
    content = _content()
    return (content["triton"], content.get("sources")) == (TRITON_VERSION, sources())


def problems(gpu: str, table: Table, before: dict[str, Any]) -> list[str]:
    """What is wrong with a GPU's kernels, one line each."""
    if not GPUS[gpu].is_checked:
        return []
    found = []
    for configuration in listed(gpu):
        launches, known = table[gpu].get(configuration.name, []), before.get(gpu, {}).get(configuration.name)
        if not launches:
            found.append(f"{gpu}, {configuration.name}: launches no kernel")
        if known is None or len(known) != len(launches):
            found.append(f"{gpu}, {configuration.name}: not recorded, run `make gpu-kernels`")
            known = [None] * len(launches)
        for measured, then in zip(launches, known, strict=True):
            found += [
                f"{gpu}, {configuration.name}: {complaint}"
                for complaint in complaints(
                    measured,
                    GPUS[gpu],
                    hot=configuration.hot,
                    needs_mma=configuration.needs_mma,
                    before=then,
                )
            ]
    stale = before.get(gpu, {}).keys() - {configuration.name for configuration in listed(gpu)}
    return found + [
        f"{gpu}, {name}: recorded but not in use, run `make gpu-kernels`" for name in sorted(stale)
    ]


def recorded() -> Table:
    """What is recorded, in the form in which it was measured."""
    return {
        gpu: {name: [Measured(**launch) for launch in launches] for name, launches in kernels.items()}
        for gpu, kernels in load().items()
    }


def write(table: Table) -> None:
    """Record what was measured, and render it."""
    content = {
        gpu: {name: [measured._asdict() for measured in launches] for name, launches in kernels.items()}
        for gpu, kernels in table.items()
    }
    RECORD.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        f'    "{gpu}": {{\n'
        + ",\n".join(
            f"      {json.dumps(name)}: {json.dumps(launches)}" for name, launches in kernels.items()
        )
        + "\n    }"
        for gpu, kernels in content.items()
    ]
    RECORD.write_text(
        f'{{\n  "triton": "{TRITON_VERSION}",\n  "sources": "{sources()}",\n  "gpus": {{\n'
        + ",\n".join(lines)
        + "\n  }\n}\n"
    )
    PAGE.write_text(render(table))


HEADING = f"""# GPU kernels as compiled

Every Triton kernel in the configurations that the published models use, compiled ahead of time by Triton
{TRITON_VERSION}, without a GPU. `make gpu-kernels` writes this page; `make test` compiles again (one
GPU's only, while their sources are those of this record) and fails when a
kernel of small steps (bold) spills registers (on sm_86 and sm_120 up to eight instructions outside of loops may), one
wants more shared memory than the GPU has or has lost its
matrix instructions or 16-byte loads, or when any number here grew. Nothing here is a measurement of speed. gfx942 is
shown for the curious and not checked.

Each cell: registers of a thread, KiB of shared memory of a program, its matrix instructions (`mma` is mma.sync;
`wgmma`, `tcgen05`, `mfma`). Then, where there is something to say: `narrow`, no load from global memory is 16 bytes
wide; `spills 3+2`, three instructions that spill registers outside of loops and two inside; `does not fit`, more
shared memory than the GPU has.

"""
MMA_NAMES = {"HGMMA": "wgmma", "UTCHMMA": "tcgen05", "v_mfma": "mfma"}


def render(table: Table) -> str:
    """The table as Markdown: a line for each configuration, a column for each GPU."""
    names = list(dict.fromkeys(name for kernels in table.values() for name in kernels))
    hot = {configuration.name for gpu in GPUS for configuration in listed(gpu) if configuration.hot}
    lines = [
        "| kernel | " + " | ".join(GPUS) + " |",
        "|---|" + "---|" * len(GPUS),
    ]
    for name in names:
        cells = ["; ".join(cell(m, GPUS[gpu]) for m in table[gpu].get(name, [])) or "–" for gpu in GPUS]
        lines.append(f"| {f'**{name}**' if name in hot else name} | " + " | ".join(cells) + " |")
    return HEADING + "\n".join(lines) + "\n"


def cell(measured: Measured, gpu: Gpu) -> str:
    parts = [str(measured.registers), f"{measured.shared / 1024:.3g}K"]
    parts += sorted({MMA_NAMES.get(name, "mma") for name in measured.mma})
    if not is_wide(measured.loads):
        parts.append("narrow")
    if measured.spills:
        parts.append(f"spills {measured.spills - measured.looped_spills}+{measured.looped_spills}")
    if measured.shared > gpu.max_shared:
        parts.append("does not fit")
    return " ".join(parts)
