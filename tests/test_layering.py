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

# Modules whose tests need no tensors and whose users must not pay for importing torch.
TORCH_FREE = (
    "admission",
    "block_pool",
    "calls",
    "config",
    "conversation",
    "deadlines",
    "errors",
    "evaluate.command",
    "evaluate.metrics",
    "evaluate.outcomes",
    "evaluate.report",
    "evaluate.rows",
    "evaluate.summary",
    "fingerprint",
    "foreign_ids",
    "gate",
    "gen.answers",
    "gen.grammar",
    "gen.parse",
    "idle_streams",
    "garbage",
    "integrations.guard",
    "integrations.held",
    "integrations.openai",
    "integrations.sglang",
    "integrations.trl",
    "integrations.vllm",
    "judging",
    "labels",
    "policy",
    "prefix_cache",
    "readout",
    "records",
    "residency",
    "retokenizer",
    "rewards",
    "scheduler",
    "state",
    "step_times",
    "text_books",
    "thinking",
    "unicode_rules",
    "upstream_key",
)
# Lower layers never import higher ones; names on one line do not import each other.
LAYERS = (
    ("errors", "_version", "garbage", "byte_level", "unicode_rules", "lm_head", "thinking"),
    ("labels", "config", "foreign_ids", "upstream_key"),
    ("policy", "text_books", "gen.parse"),
    ("gen.grammar",),
    ("gen.answers",),
    ("state", "judging"),
    ("rewards",),
    (
        "prefix_cache",
        "idle_streams",
        "deadlines",
        "scheduler",
        "checkpoint",
        "tokenizer",
        "gate",
        "fingerprint",
        "step_times",
        "accelerator",
    ),
    ("weights", "retokenizer", "batch", "block_pool", "admission", "calls"),
    ("chat",),
    ("gen.prompts",),
    ("step_inputs", "tuned"),
    ("model", "conversation", "machine", "residency", "gpu_limits"),
    ("runner", "readout", "captured_steps"),
    ("pipeline", "cpu_runner", "gpu_runner", "records"),
    ("snapshot",),
    ("core",),
    ("audit", "gen.answering"),
    ("gen.moderation",),
    ("text_stream", "loading", "whole_streams", "health"),
    ("stream",),
    ("engine", "isolation", "audit_reader"),
    ("compat", "engine_thread", "replay"),
    ("async_stream", "shown", "pull_ahead"),
    ("async_engine", "deltas"),
    ("guarded_reply",),
    ("intervention",),
)


# Whose modules have places of their own in the layers.
SUBPACKAGES = {name.partition(".")[0] for names in LAYERS for name in names if "." in name}


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


def test_imports_point_down() -> None:
    level = {name: depth for depth, names in enumerate(LAYERS) for name in names}
    for name, depth in level.items():
        for imported in imports(PACKAGE / f"{name.replace('.', '/')}.py"):
            parts = imported.removeprefix("guardengine.").split(".")
            other = ".".join(parts[: 2 if parts[0] in SUBPACKAGES else 1])
            if imported.startswith("guardengine.") and other in level:
                assert level[other] < depth, f"{name} imports {other}, which is not below it"


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
            # It needs no other software: it knows the names in a chunk.
            assert not {name for name in names if not name.startswith("guardengine.integrations.openai")}, (
                path
            )


# What the extra `server` brings, and the parts of the server that must not need it.
WEB = {"fastapi", "starlette", "uvicorn", "pydantic", "prometheus_client", "httpx", "websockets"}
WEB_FREE = (
    "__init__",
    "command",
    "settings",
    "taxonomy",
    "wire",
    "statuses",
    "judging",
    "long_texts",
    "drain",
    "requirements",
)


# The same of the proxy, which is built on the server.
PROXY_WEB_FREE = (
    "__init__",
    "command",
    "settings",
    "strict_json",
    "errors",
    "events",
    "chat_request",
    "choice",
    "parts",
    "answers",
    "reply_stream",
)


def test_only_server_client_and_proxy_know_the_web() -> None:
    for path in MODULES:
        names = imports(path)
        folder = path.parent.name
        free = {"server": WEB_FREE, "client": (), "proxy": PROXY_WEB_FREE}.get(folder)
        if free is None or path.stem in free:
            assert not {name.partition(".")[0] for name in names} & WEB, path
        # Beside the command line, which names them, nothing needs any, but a Guard, which may ask a
        # server, and what runs the server on Ray.
        above = {"guardengine.server", "guardengine.client", "guardengine.proxy"}
        if path == PACKAGE / "integrations" / "guard.py":
            above.remove("guardengine.client")
        if folder not in ("server", "client", "proxy", "on_ray") and path != PACKAGE / "cli.py":
            assert not {n for n in names if n.startswith(tuple(above))}, path
        if folder in ("server", "client"):
            assert not {name for name in names if name.startswith("guardengine.proxy")}, path
        if folder in ("server", "proxy"):
            assert not {name for name in names if name.startswith("guardengine.client")}, path
            assert "torch" not in names, path
        if folder != "on_ray":
            assert "ray" not in {name.partition(".")[0] for name in names}, path
            if path.stem not in ("cli", "command"):
                assert not {name for name in names if name.startswith("guardengine.on_ray")}, path


@pytest.mark.parametrize(
    "name",
    [
        "server.command",
        "server.settings",
        "server.wire",
        "client",
        "client.command",
        "client.chat_command",
        "proxy",
        "proxy.command",
        "on_ray.command",
    ],
)
def test_the_web_is_imported_when_it_is_used(name: str) -> None:
    code = f"import sys, guardengine.{name}; sys.exit(bool(set({sorted(WEB | {'torch', 'ray'})!r}) & set(sys.modules)))"
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
