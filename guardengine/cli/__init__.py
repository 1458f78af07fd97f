"""The `guardengine` command: one file a command, and one of what several take."""

from guardengine.cli.command_line import build_parser, main

__all__ = ["build_parser", "main"]
