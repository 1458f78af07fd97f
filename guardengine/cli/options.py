"""Options that several commands take: those of the engine, made from the fields of EngineConfig, and a few more."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from dataclasses import Field, fields
from functools import cache
from typing import Any, TypeAlias, get_args, get_type_hints

from guardengine.config import EngineConfig

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
Group: TypeAlias = argparse._ArgumentGroup | argparse.ArgumentParser
Options = tuple[tuple[str, type, str], ...]  # names in Python, types, what they are

# What `Engine.from_pretrained` takes beside the fields of EngineConfig: names and what they are.
LOADING = {
    "device": "auto, cpu, cuda or cuda:N (default: auto)",
    "backend": "the engine's operators: auto, reference, cpu or triton (default: auto)",
    "dtype": "auto, float32 or bfloat16 (default: auto, the checkpoint's)",
    "quantization": "of the layers' matrices: int8 or w8a8 (default: none)",
}
# Other spellings of flags.
_ALIASES = {"num_threads": ("--threads",)}


def engine_option_names() -> tuple[str, ...]:
    """All options that `add_engine_options` can add, by their names in Python."""
    return (*LOADING, *(option.name for option in fields(EngineConfig)))


def add_engine_options(group: Group, *names: str, defaults: Mapping[str, Any] | None = None) -> None:
    """Add flags of the engine. Ranges are checked by the engine, not by the parser.

    Args:
        group: What to add them to.
        names: Which, by their names in Python. Without any: all there are.
        defaults: Of fields of EngineConfig, where a command has another default than EngineConfig.
    """
    config = {option.name: option for option in fields(EngineConfig)}
    for name in names or engine_option_names():
        flags = (flag(name), *_ALIASES.get(name, ()))
        if name in LOADING:
            group.add_argument(*flags, metavar="NAME", help=LOADING[name])
        else:
            _add(group, flags, config[name], (defaults or {}).get(name))


def _add(group: Group, flags: tuple[str, ...], option: Field[Any], default: Any) -> None:
    """Add the flags of one field. default: the command's own, or None."""
    kind, about = _kinds()[option.name], option.metadata
    shown = option.default if default is None else default
    if shown is None:
        shown = about["if_none"]
    if kind is bool:
        text = f"{about['help']} (default: {'yes' if shown else 'no'})"
        group.add_argument(*flags, action=argparse.BooleanOptionalAction, default=default, help=text)
        return
    unit = f"{about['unit']}; " if "unit" in about and about["unit"] not in about["help"] else ""
    metavar = None if "choices" in about else {int: "N", float: "X", str: "FILE"}[kind]
    group.add_argument(
        *flags,
        type=kind,
        metavar=metavar,
        choices=about.get("choices"),
        default=default,
        help=f"{about['help']} ({unit}default: {shown})",
    )


@cache
def _kinds() -> dict[str, type]:
    """The type of each field, None left aside, and str for what is a path."""
    return {
        name: next(kind for kind in (bool, int, float, str) if kind in (get_args(hint) or (hint,)))
        for name, hint in get_type_hints(EngineConfig).items()
    }


def engine_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The engine's options that were given, for `Engine.from_pretrained`."""
    return given(arguments, engine_option_names())


def add_options(group: argparse._ArgumentGroup, options: Options) -> None:
    """Add options that take a number or a word."""
    for name, kind, text in options:
        group.add_argument(flag(name), type=kind, metavar="X", help=text)


def given(arguments: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """The options that were given, by their names in Python."""
    found = ((name, getattr(arguments, name, None)) for name in names)
    return {name: value for name, value in found if value is not None}


def flag(name: str) -> str:
    """How an option is spelled on the command line."""
    return f"--{name.replace('_', '-')}"


def add_access(parser: argparse.ArgumentParser) -> None:
    """Where to listen, and who may call."""
    access = parser.add_argument_group("access")
    access.add_argument("--host", default="127.0.0.1", help="(default: %(default)s)")
    access.add_argument("--port", type=int, default=8000, help="0: any (default: %(default)s)")
    access.add_argument("--ssl-certfile", metavar="FILE")
    access.add_argument("--ssl-keyfile", metavar="FILE")
    access.add_argument(
        "--api-key-file",
        metavar="FILE",
        help="keys, one a line as KEY or NAME KEY; more may be in GUARDENGINE_API_KEYS, between commas. Without any, "
        "everybody who reaches the port may call",
    )
    access.add_argument(
        "--cors-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="browsers' pages that may call; *: all",
    )


def add_logs(parser: argparse.ArgumentParser) -> None:
    """What is logged."""
    logs = parser.add_argument_group("log")
    logs.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="info")
    logs.add_argument(
        "--log-text", action="store_true", help="users' texts too, which are never logged otherwise"
    )
