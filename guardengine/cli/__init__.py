"""The `guardengine` command: one file a command, and one of what several take."""

from guardengine.cli.command_line import main

__all__ = ["main"]
