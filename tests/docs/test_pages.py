"""The pages hang together: links and paths lead somewhere, what is written from the code is whole, the site builds."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import ModuleType

import pytest
from pages import PAGES, ROOT

import guardengine
from guardengine import EngineConfig, errors
from guardengine.cli import build_parser

DOCUMENTS = (*PAGES, *sorted(ROOT.glob("*.md")), *sorted((ROOT / "benchmarks").rglob("*.md")))
SOURCES = [
    path
    for folder in ("guardengine", "kernels", "tests", "benchmarks", "examples", "deploy")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".yml", ".yaml", ".html", ".json")
] + [ROOT / "Makefile", ROOT / "pyproject.toml", ROOT / "setup.py"]


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    """docs/generate.py, which is no part of a package."""
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL))


def anchors(page: Path) -> set[str]:
    """The fragments that a page's headings answer to."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}


@pytest.mark.parametrize("page", dict.fromkeys(DOCUMENTS), ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        if "://" in target:
            continue
        path, _, fragment = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        assert other.exists(), target
        assert not fragment or fragment in anchors(other), target


def test_pages_that_the_sources_name_exist() -> None:
    for path in SOURCES:
        for name in re.findall(
            r"\bdocs/[\w./-]+\.(?:md|png)\b|\b(?:DECISIONS|SPEED)\.md\b", path.read_text()
        ):
            assert (ROOT / name).exists(), (path, name)


def test_files_that_the_pages_name_exist() -> None:
    folders = "guardengine|kernels|tests|csrc|benchmarks|deploy|examples"
    names = rf"`((?:{folders})/[\w/.-]+\.(?:py|md|json|h|cpp|yaml|html))`"
    for page in dict.fromkeys(DOCUMENTS):
        for name in re.findall(names, page.read_text()):
            assert (ROOT / name).exists(), (page, name)


def test_every_guarantee_names_its_tests() -> None:
    page = (ROOT / "docs" / "guarantees.md").read_text()
    rows = re.findall(r"^\| (?!promise)([^|\n-].*?) \| (.+) \|$", page, re.MULTILINE)
    assert len(rows) > 40
    for promise, tests in rows:
        named = re.findall(r"`(tests/[\w/.]+)`", tests)
        assert named, promise
        assert all((ROOT / name).exists() for name in named), named


def test_nobody_is_sent_to_an_index_that_does_not_have_the_package() -> None:
    for page in dict.fromkeys(DOCUMENTS):
        assert not re.search(r"pip install ['\"]?guardengine\b(?!\[\w+\] @ git)", page.read_text()), page


def test_the_reference_has_every_public_name(generate: ModuleType) -> None:
    listed = [name for names in generate.API.values() for name in names]
    public = {name for name in guardengine.__all__ if name != "__version__" and not hasattr(errors, name)}
    assert len(listed) == len(set(listed))
    assert set(listed) == public


def test_arguments_stand_on_a_line_each(generate: ModuleType) -> None:
    """As the site's generator reads them: it warns of `a, b: ...`, and a warning fails the build."""
    for name in re.findall(r"^::: ([\w.]+)$", generate.api(), re.MULTILINE):
        module, _, wanted = name.rpartition(".")
        tree = ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text())
        (top,) = (node for node in tree.body if getattr(node, "name", None) == wanted)
        for node in ast.walk(top):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                arguments = re.search(
                    r"^Args:\n((?: .*\n?|\n)+)", ast.get_docstring(node) or "", re.MULTILINE
                )
                assert not arguments or not re.search(r"^ {4}\w+(?:, \w+)+:", arguments[1], re.MULTILINE), (
                    node.name
                )


def test_the_reference_has_every_option(generate: ModuleType) -> None:
    rows = generate.options().splitlines()[2:]
    assert [re.match(r"\| `(\w+)` \|", row)[1] for row in rows] == [
        each.name for each in fields(EngineConfig)
    ]
    assert all(
        re.fullmatch(r"\| `\w+` \| `.+?` \| `.+ \| \w.+ \|", row) for row in rows
    )  # each with its help


def test_the_reference_has_every_command(generate: ModuleType) -> None:
    (commands,) = (each for each in build_parser()._actions if each.dest == "command")
    text = generate.commands()
    assert re.findall(r"^## guardengine ([\w-]+)", text, re.MULTILINE) == list(commands.choices)
    for option in ("--kv-cache-bytes", "--upstream", "--allow-bad-rows"):
        assert f"| `{option} " in text


def test_the_reference_has_every_error(generate: ModuleType) -> None:
    classes = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert set(re.findall(r"^## (\w+)$", generate.errors(), re.MULTILINE)) == classes


def test_the_reference_has_every_metric(generate: ModuleType) -> None:
    text = generate.metrics()
    for stem in ("kv_cache_usage_perc", "verdicts", "failures", "proxy_replies"):
        assert f"`guardengine:{stem}`" in text
    assert text.count("\n## ") == 1


def test_every_part_that_a_page_asks_for_is_there(generate: ModuleType) -> None:
    wanted = [match for page in PAGES for match in re.findall(generate.GENERATED, page.read_text())]
    assert {name for name, _ in wanted} == set(generate.PARTS)
    assert all(arguments == "" or (ROOT / arguments.strip()).is_dir() for _, arguments in wanted)


def test_every_package_has_a_page_of_design_with_its_modules(generate: ModuleType) -> None:
    text = "".join(page.read_text() for page in (ROOT / "docs" / "design").glob("*.md"))
    for path in (ROOT / "guardengine").glob("*/__init__.py"):
        assert f"<!-- generated: modules guardengine/{path.parent.name} -->" in text
    assert "| `engine_core.py` | EngineCore" in generate.modules("guardengine/core")


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("mkdocs"), reason="mkdocs is not installed (the extra docs)")
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "reference" / "options" / "index.html").stat().st_size > 10_000
