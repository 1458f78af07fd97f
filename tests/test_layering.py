"""The shape of the tree: which module may import which, file sizes, and what importing costs."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import guardengine
from guardengine import kernels

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "guardengine"
MODULES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])

# What each package may import of guardengine: the rows above its own never. Names on one line do not import each other.
LAYERS = (
    ("errors", "_version", "_moved", "kernels"),
    ("checks", "extras"),
    ("text", "client"),
    ("labels",),
    ("policy", "config", "checkpoint"),
    ("runners",),
    ("core", "measuring"),
    ("gen", "records"),
    ("engine",),
    ("guarding", "server", "annotate", "evaluate", "verify", "compat", "rewards"),
    ("integrations", "proxy", "on_ray"),
    ("terminal", "bench"),
    ("cli",),
    ("__main__",),
)
LEVEL = {name: depth for depth, names in enumerate(LAYERS) for name in names}
LARGEST_FOLDER = 20  # modules

# Modules whose users must not pay for importing torch: what the books, texts, policies and command lines are made of.
TORCH_FREE = (
    "checks",
    "checkpoint.presets",
    "cli",
    "client",
    "config",
    "core.admission",
    "core.block_pool",
    "core.deadlines",
    "core.feeds",
    "core.gate",
    "core.prefix_cache",
    "core.readout",
    "core.residency",
    "core.scheduler",
    "core.state",
    "engine.calls",
    "engine.memory",
    "engine.moderator",
    "errors",
    "extras",
    "evaluate.metrics",
    "evaluate.outcomes",
    "evaluate.report",
    "evaluate.rows",
    "evaluate.summary",
    "checkpoint.fingerprint",
    "checkpoint.model_config",
    "gen.answers",
    "gen.grammar",
    "gen.parse",
    "guarding.held",
    "guarding.relay",
    "integrations.guard",
    "integrations.judges",
    "integrations.openai",
    "integrations.sglang",
    "integrations.trl",
    "integrations.vllm",
    "labels",
    "policy",
    "records.codec",
    "rewards",
    "text.foreign_ids",
    "text.retokenizer",
    "text.spans",
    "text.thinking",
    "text.unicode_rules",
    "verify.schemes",
)


def imports(path: Path, *, top_level: bool = False) -> set[str]:
    """Dotted names that a file imports, anywhere in it or only when it is itself imported."""
    tree = ast.parse(path.read_text())
    found: set[str] = set()
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def package(name: str) -> str | None:
    """The row of LAYERS that a dotted name belongs to."""
    parts = name.split(".")
    return parts[1] if parts[0] == "guardengine" and len(parts) > 1 and parts[1] in LEVEL else None


def test_imports_point_down() -> None:
    for path in PACKAGE.rglob("*.py"):
        own = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if own == "__init__":
            continue
        for imported in imports(path):
            other = package(imported)
            if other not in (None, own, "_version"):
                assert LEVEL[other] < LEVEL[own], f"{path} imports {imported}, which is not below it"


def test_every_package_has_its_row() -> None:
    found = {
        path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert found - {"__init__"} == set(LEVEL) - {
        "kernels"
    }  # which lies beside guardengine/, and is installed in it


def test_no_folder_is_too_large() -> None:
    for folder in {path.parent for path in MODULES}:
        modules = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(modules) <= LARGEST_FOLDER, f"{folder} has {len(modules)} modules: split it"


@pytest.mark.slow
@pytest.mark.parametrize("name", TORCH_FREE)
def test_importing_the_books_does_not_import_torch(name: str) -> None:
    code = f"import sys, guardengine.{name}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0


def test_kernels_know_nothing_of_the_engine() -> None:
    for path in (ROOT / "kernels").rglob("*.py"):
        assert not {
            name for name in imports(path) if name.startswith("guardengine") and "kernels" not in name
        }


def test_backends_have_the_same_functions() -> None:
    import inspect

    def functions(backend: str) -> dict[str, list[tuple[str, object, object]]]:
        """Names, kinds and defaults of parameters; a backend's own type of quantized weight is its business, and so
        are keywords of its own that have a default."""
        module = kernels.load(backend)
        return {
            name: [
                (p.name, p.kind, p.default)
                for p in inspect.signature(getattr(module, name)).parameters.values()
                if p.kind != p.KEYWORD_ONLY or p.default is p.empty
            ]
            for name in kernels.OPERATORS
        }

    has_triton = importlib.util.find_spec("triton") is not None
    for backend in kernels.BACKENDS:
        if backend == "triton" and not has_triton:
            continue
        assert functions(backend) == functions("reference")


def test_no_transformers_or_pickle_at_run_time() -> None:
    for path in MODULES:
        names = {name.partition(".")[0] for name in imports(path, top_level=path.parts[-2] == "bench")}
        assert not names & {"pickle", "dashscope", "pytest", "dill", "cloudpickle"}, path
        # What meets other software may import that, and nothing imports it.
        assert "transformers" not in names or path == PACKAGE / "integrations" / "transformers.py", path
        if path.parts[-2] != "integrations":
            names = {name for name in imports(path) if name.startswith("guardengine.integrations")}
            # They need no other software: the one knows the names in a chunk, the others a server and an engine.
            free = tuple(f"guardengine.integrations.{name}" for name in ("openai", "judges", "own_loop"))
            assert not {name for name in names if not name.startswith(free)}, path


# What extras bring, and who may know it: the packages named, but for the modules that work without.
WEB = {"fastapi", "starlette", "uvicorn", "pydantic", "prometheus_client", "httpx", "websockets"}
WEB_FREE = {
    "server": "settings refusals drain json_values taxonomy",
    "proxy": "settings strict_json errors events chat_request choice parts answers reply_stream",
    "client": "",
    "terminal": "chat printer",
    "on_ray": "",
}


def test_only_server_client_and_proxy_know_the_web() -> None:
    for path in (path for path in MODULES if path.name != "__init__.py"):
        folder, *rest = (
            path.relative_to(PACKAGE).with_suffix("").parts
            if path.is_relative_to(PACKAGE)
            else ("kernels", "")
        )
        names = {name.partition(".")[0] for name in imports(path)}
        if folder not in WEB_FREE or "/".join(rest) in WEB_FREE[folder].split():
            assert not names & WEB, path
        if folder in ("server", "proxy"):
            assert "torch" not in names, path
        if folder != "on_ray":
            assert "ray" not in names, path
        if folder not in ("on_ray", "cli"):
            assert not {name for name in imports(path) if name.startswith("guardengine.on_ray")}, path


@pytest.mark.parametrize(
    "name",
    ["server.settings", "server.json_values", "client", "proxy", "cli.serve", "cli.moderate", "cli.chat"],
)
def test_the_web_is_imported_when_it_is_used(name: str) -> None:
    code = (
        f"import sys, guardengine.{name}; sys.exit(bool(set({sorted(WEB | {'ray'})!r}) & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0


def test_no_asserts_as_checks() -> None:
    """`python -O` removes asserts, so library code must not rely on them."""
    for path in MODULES:
        assert not [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Assert)], (
            path
        )


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_stay_readable(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    assert not text or ast.get_docstring(ast.parse(text)) or path.name == "_version.py"


def test_every_public_name_resolves() -> None:
    for name in guardengine.__all__:
        assert getattr(guardengine, name) is not None
    assert set(dir(guardengine)) == set(guardengine.__all__)
    with pytest.raises(AttributeError):
        _ = guardengine.nonsense


def test_import_is_fast() -> None:
    """Promised: under 1.5 s. The package itself is lazy, so it costs a few milliseconds; best of three."""
    code = "import time; t = time.perf_counter(); import guardengine; print(time.perf_counter() - t)"
    runs = [
        subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, check=True) for _ in range(3)
    ]
    assert min(float(run.stdout) for run in runs) < 1.5


def test_a_folder_named_kernels_is_not_importable_from_elsewhere(tmp_path: Path) -> None:
    """A top-level module `kernels` would be taken for Hugging Face's package of that name."""
    code = "import importlib.util as u, guardengine.kernels; raise SystemExit(u.find_spec('kernels') is not None)"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    run = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, env=environment, check=False)
    assert run.returncode == 0
