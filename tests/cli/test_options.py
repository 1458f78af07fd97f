"""Flags of the engine: one for every field of EngineConfig, made from what the field says of itself."""

from __future__ import annotations

import argparse
from dataclasses import fields

import pytest

from guardengine import ConfigError, EngineConfig
from guardengine.cli import build_parser
from guardengine.cli.options import LOADING, engine_option_names, engine_options, flag

OPTIONS = {option.name: option for option in fields(EngineConfig)}
# What a flag is given, and what the engine gets.
VALUES = {
    "kv_dtype": ("int8", "int8"),
    "kv_reserve": ("0.5", 0.5),
    "max_step_ms": ("7.5", 7.5),
    "idle_ttl_s": ("7.5", 7.5),
    "audit_log": ("audit.jsonl", "audit.jsonl"),
}
COMMANDS = {
    "serve": ["serve", "CHECKPOINT"],
    "proxy": ["proxy", "CHECKPOINT", "--upstream", "http://127.0.0.1:1"],
    "ray-serve": ["ray-serve", "CHECKPOINT"],
}
# Commands that take a few of them only.
FEW = {
    "evaluate": (
        ["evaluate", "FILE", "--checkpoint", "CHECKPOINT"],
        "device backend dtype quantization num_threads",
    ),
    "annotate": (
        ["annotate", "IN", "OUT", "--checkpoint", "CHECKPOINT"],
        "backend quantization num_threads",
    ),
    "verify-quantization": (["verify-quantization", "CHECKPOINT"], "backend num_threads"),
    "replay": (["replay", "LOG", "--checkpoint", "CHECKPOINT"], "backend num_threads"),
    "moderate": (
        ["moderate", "--checkpoint", "CHECKPOINT"],
        "device backend dtype quantization num_threads",
    ),
    "chat": (
        ["chat", "--upstream", "URL", "--model", "NAME", "--checkpoint", "CHECKPOINT"],
        "device backend dtype quantization num_threads",
    ),
}


def parsed(arguments: list[str]) -> argparse.Namespace:
    return build_parser().parse_args(arguments)


def given(name: str) -> tuple[list[str], object]:
    """An option on the command line, and what the engine gets."""
    if name in LOADING:
        return [flag(name), "some"], "some"
    default = OPTIONS[name].default
    if isinstance(default, bool):
        return [flag(name) if not default else f"--no-{flag(name)[2:]}"], not default
    text, value = VALUES.get(name, ("7", 7))
    return [flag(name), text], value


@pytest.mark.parametrize("name", OPTIONS)
def test_every_field_says_what_it_is_and_what_it_may_be(name: str) -> None:
    option = OPTIONS[name]
    about = option.metadata
    assert about["help"]
    assert not about["help"].endswith(".")
    assert (option.default is None) == ("if_none" in about)
    if "largest" in about:
        assert EngineConfig.from_options({name: about["least"]})
        assert EngineConfig.from_options({name: about["largest"]})
        for value in (about["least"] - 1, about["largest"] + 1, True, 1.0, "1"):
            with pytest.raises(ConfigError, match=f"{name}=.*from {about['least']} to {about['largest']}"):
                EngineConfig.from_options({name: value})
    elif "below" in about:
        low = about.get("least", about.get("above"))
        assert ("least" in about) != ("above" in about)
        for value in (low - 1, about["below"], True, "1", float("nan")):
            with pytest.raises(ConfigError, match=f"{name}=.*below"):
                EngineConfig.from_options({name: value})
        if "least" in about:
            assert EngineConfig.from_options({name: low})
        else:
            with pytest.raises(ConfigError, match=f"{name}=.*above {low}"):
                EngineConfig.from_options({name: low})
    elif "choices" in about:
        for value in about["choices"]:
            assert EngineConfig.from_options({name: value})
    else:
        assert isinstance(option.default, bool) or name == "audit_log"
        with pytest.raises(ConfigError, match=f"{name}="):
            EngineConfig.from_options({name: 7})


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", engine_option_names())
def test_every_option_of_the_engine_is_a_flag_of_what_serves(command: str, name: str) -> None:
    arguments, value = given(name)
    options = engine_options(parsed([*COMMANDS[command], *arguments]))
    assert options[name] == value
    assert set(options) - {name} <= {"max_step_ms"}  # which has a default of the proxy's own
    EngineConfig.from_options({name: value for name, value in options.items() if name not in LOADING})


@pytest.mark.parametrize("command", FEW)
def test_other_commands_take_some_of_them(command: str) -> None:
    arguments, names = FEW[command]
    assert engine_options(parsed(arguments)) == {}
    for name in names.split():
        flags, value = given(name)
        assert engine_options(parsed([*arguments, *flags])) == {name: value}


@pytest.mark.parametrize(
    "arguments", [*COMMANDS.values(), *(arguments for arguments, _ in FEW.values())], ids=lambda a: a[0]
)
def test_threads_have_two_spellings(arguments: list[str]) -> None:
    for spelling in ("--threads", "--num-threads"):
        assert engine_options(parsed([*arguments, spelling, "3"]))["num_threads"] == 3


def test_help_says_units_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed(["proxy", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "in all (bytes; default: 4 GiB, or half of the memory that is free" in text
    assert "streams that are open at the same time (default: 256)" in text
    assert "a step should take at most (milliseconds; default: 50.0)" in text  # the proxy's own
    assert "begin alike (default: yes)" in text
