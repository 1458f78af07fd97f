"""The parts of these pages that are written from the code, each time the site is built, so that they cannot go stale.

mkdocs calls the hooks at the end (mkdocs.yml). A page asks for a part with a comment: <!-- generated: options -->
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
GENERATED = r"<!-- generated: (\w+)(.*?) -->"

# The sections of the page of the API: what is importable from guardengine, by what it is for.
API = {
    "The engine": ("Engine", "Stream", "EngineConfig"),
    "asyncio": ("AsyncEngine", "AsyncStream"),
    "Results": ("Label", "Verdict", "Moderation", "GenModeration", "Span"),
    "Policies": ("Policy",),
    "Generation loops": ("guarded", "guarded_sync", "intervene"),
    "The released class's calls": ("AutoGuard",),
    "Checkpoints and processes": ("ModelConfig", "collect_rarely"),
}
ELSEWHERE = {
    "guardengine.client": ("client.sync_client.GuardClient", "client.async_client.AsyncGuardClient"),
    "guardengine.integrations.guard": ("integrations.guard.Guard",),
    "guardengine.rewards": ("rewards.GuardReward", "rewards.Reward"),
}


def api() -> str:
    """Instructions for mkdocstrings, which reads the sources."""
    import guardengine

    def entries(names: tuple[str, ...]) -> Iterator[str]:
        for name in names:
            value = getattr(guardengine, name)
            yield f"::: {value.__module__}.{value.__qualname__}\n"

    lines = []
    for title, names in API.items():
        lines += [f"## {title}\n", *entries(names)]
    for title, names in ELSEWHERE.items():
        lines += [f"## `{title}`\n", *(f"::: guardengine.{name}\n" for name in names)]
    return "\n".join([*lines, "## Errors\n", "[A page of their own](errors.md)."])


def options() -> str:
    """Every field of EngineConfig: its default, what is allowed, and its help."""
    from guardengine import EngineConfig

    lines = ["| option | default | allowed | what it is |", "|---|---|---|---|"]
    for field in dataclasses.fields(EngineConfig):
        about = field.metadata
        text = _cell(about.get("help", "")) + (
            f"; None: {_cell(about['if_none'])}" if "if_none" in about else ""
        )
        lines.append(f"| `{field.name}` | `{field.default!r}` | {_allowed(field)} | {text} |")
    return "\n".join(lines)


def commands() -> str:
    """Every command with its arguments and options, from its parser."""
    from guardengine.cli import build_parser

    parser = build_parser()
    lines = []
    for name, command in _subparsers(parser):
        lines += [f"## guardengine {name}\n", _prose(command.description or ""), ""]
        lines += [f"```\n{_usage(command)}\n```\n", "| option | default | what it is |", "|---|---|---|"]
        lines += [_option(command, action) for action in command._actions if _is_shown(action)]
        lines += ["", _prose(command.epilog or ""), ""]
    return "\n".join(lines)


def errors() -> str:
    """The tree as errors.py draws it, and every error's docstring."""
    from guardengine import errors as module

    tree = inspect.cleandoc(module.__doc__ or "").split("\n\n")
    drawing = next(part for part in tree if "└──" in part)
    lines = ["```", inspect.cleandoc(drawing), "```", ""]
    for name in dict.fromkeys(re.findall(r"\w+", drawing)):
        if isinstance(value := getattr(module, name, None), type):
            lines += [f"## {name}", "", _sections(inspect.getdoc(value) or ""), ""]
    return "\n".join(lines)


def metrics() -> str:
    """What a server counts, and what the proxy adds, from their registries."""
    from guardengine.proxy.metrics import ProxyMetrics
    from guardengine.server.metrics import Metrics

    server = Metrics({"qwen3guard-stream": _NoEngine()})
    of_server = {family.name for family in server.registry.collect()}
    ProxyMetrics(server.registry)
    tables: dict[str, list[str]] = {"Of every server": [], "Of the proxy": []}
    for family in sorted(server.registry.collect(), key=lambda family: family.name):
        title = "Of every server" if family.name in of_server else "Of the proxy"
        tables[title].append(f"| `{family.name}` | {family.type} | {_cell(family.documentation)} |")
    parts = [
        f"## {title}\n\n| metric | type | what it is |\n|---|---|---|\n" + "\n".join(rows)
        for title, rows in tables.items()
    ]
    return "\n\n".join(parts)


def modules(folder: str) -> str:
    """The modules of a folder of the repository, and of the folders in it, with what their docstrings begin with."""
    lines = ["| module | what it is |", "|---|---|"]
    pattern = "*.py" if folder == "guardengine" else "**/*.py"
    for path in sorted((ROOT / folder).glob(pattern)):
        text = ast.get_docstring(ast.parse(path.read_text())) or ""
        if path.name.startswith("_"):
            continue
        first = re.split(r"\n\n|(?<=\.)\s", text, maxsplit=1)[0]
        lines.append(f"| `{path.relative_to(ROOT / folder)}` | {_cell(first)} |")
    return "\n".join(lines)


PARTS: dict[str, Callable[..., str]] = {
    "api": api,
    "options": options,
    "commands": commands,
    "errors": errors,
    "metrics": metrics,
    "modules": modules,
}


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """mkdocs' hook: a page's text with its generated parts, and without links to what is not on the site."""
    markdown = re.sub(GENERATED, lambda match: PARTS[match[1]](*match[2].split()), markdown)
    return _without_links_out(markdown, Path(page.file.abs_src_path).parent)


def _without_links_out(markdown: str, folder: Path) -> str:
    """Links to files of the repository that are not pages become their paths."""

    def shown(match: re.Match[str]) -> str:
        text, target = match[1], match[2].partition("#")[0]
        path = (folder / target).resolve()
        if "://" in target or not target or path.is_relative_to(ROOT / "docs") or not path.exists():
            return match[0]
        name = str(path.relative_to(ROOT))
        return f"`{name}`" if text.strip("`") == name else f"{text} (`{name}`)"

    return re.sub(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)", shown, markdown)


class _NoEngine:
    """Stands where a server has an engine: only the names of its metrics are wanted."""

    async def stats(self) -> dict[str, Any]:
        return {}


def _subparsers(
    parser: argparse.ArgumentParser, prefix: str = ""
) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """The commands, and the commands of commands, by name."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, command in action.choices.items():
                inner = list(_subparsers(command, f"{prefix}{name} "))
                yield from inner or [(f"{prefix}{name}", command)]


def _allowed(field: dataclasses.Field[Any]) -> str:
    """Which values an option may have, from its field's metadata."""
    about = field.metadata
    if "choices" in about:
        return ", ".join(f"`{choice}`" for choice in about["choices"])
    words = (("least", "from"), ("above", "above"), ("largest", "to"), ("below", "below"))
    bounds = [f"{word} {about[key]:,.16g}" for key, word in words if key in about]
    kind = str(field.type).replace(" | PathLike[str]", "").replace(" | ", " or ")
    return " ".join([f"`{kind}`", *bounds, about.get("unit", "")]).replace(" below", ", below").strip()


def _is_shown(action: argparse.Action) -> bool:
    return action.help != argparse.SUPPRESS and not isinstance(action, argparse._HelpAction)


def _usage(command: argparse.ArgumentParser) -> str:
    return re.sub(r"\s+", " ", command.format_usage().removeprefix("usage: ")).strip()


def _option(command: argparse.ArgumentParser, action: argparse.Action) -> str:
    """A row of a command's table: its names and what follows them, its default, its help."""
    value = action.metavar if isinstance(action.metavar, str) else ""
    if action.choices and not value:
        value = ", ".join(map(str, action.choices))
    names = [f"{name} {value}".strip() for name in action.option_strings] or [value or action.dest]
    shown = ", ".join(f"`{_cell(name)}`" for name in names)
    default = action.default
    has_default = default is not None and default is not False and default not in ([], argparse.SUPPRESS)
    help_text = (action.help or "") % {**vars(action), "prog": command.prog}
    return f"| {shown} | {f'`{default}`' if has_default else ''} | {_cell(help_text)} |"


def _cell(text: str) -> str:
    """Text for a cell of a table."""
    return re.sub(r"\s+", " ", text).replace("|", "\\|").replace("<", "&lt;")


def _prose(text: str) -> str:
    return inspect.cleandoc(text).replace("<", "&lt;")


def _sections(text: str) -> str:
    """A docstring whose sections `When:` and `What to do:` stand out."""
    return re.sub(r"\n+(When|What to do):", r"\n\n**\1:**", text)
