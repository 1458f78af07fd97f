"""`guardengine chat`: a guarded conversation with an LLM, in the terminal or from a script."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

from guardengine.cli import upstream_key
from guardengine.cli.moderate import add_judge, judge_of
from guardengine.cli.options import Commands
from guardengine.errors import GuardEngineError
from guardengine.extras import check_installed
from guardengine.terminal.printer import Printer, printable

_HELP = "/reset forgets the conversation, /quit leaves, Ctrl-C stops a reply"


def add_command(commands: Commands) -> None:
    """Add the command to the parser of `guardengine`."""
    chat = commands.add_parser(
        "chat",
        help="talk to an LLM, guarded",
        description="Talk to an LLM. Prompts are judged before it gets them, its replies while it writes them; only "
        "what is cleared is shown, and on a block it is stopped and the turn forgotten. From a script, every line of "
        f"stdin is a turn, and the first error ends it with 2. {_HELP}.",
    )
    chat.add_argument("--upstream", metavar="URL", required=True, help="the LLM's server, with OpenAI's API")
    chat.add_argument("--model", metavar="NAME", required=True, help="of the LLM there")
    chat.add_argument(
        "--upstream-key-file",
        type=Path,
        metavar="FILE",
        help=f"its API key; else it is read from {upstream_key.KEY_VARIABLE}",
    )
    add_judge(chat)
    chat.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    import asyncio

    check_installed("guardengine chat", "client")
    is_terminal = sys.stdin.isatty()
    notes = Printer(sys.stderr, False, arguments.color)
    with asyncio.Runner() as runner:
        stack = AsyncExitStack()
        try:
            chat = runner.run(_begin(stack, arguments, notes))
            if is_terminal:
                notes.line(f"{arguments.model}, guarded. {_HELP}.")
            for line in _typed(notes) if is_terminal else _lines():
                if line == "/quit":
                    break
                if line == "/reset":
                    chat.reset()
                    continue
                try:
                    runner.run(chat.turn(line))
                except KeyboardInterrupt:
                    notes.line("stopped")
                except GuardEngineError as error:
                    if not is_terminal:
                        raise
                    notes.line(f"guardengine: {printable(str(error))}")
        finally:
            runner.run(stack.aclose())
    return 0


async def _begin(stack: AsyncExitStack, arguments: argparse.Namespace, notes: Printer) -> Any:
    from guardengine.terminal.chat import GuardedChat
    from guardengine.terminal.llm import Upstream

    key = upstream_key.read_upstream_key(arguments.upstream_key_file)
    upstream = await stack.enter_async_context(Upstream(arguments.upstream, arguments.model, key))
    judge = judge_of(arguments, has_scores=False, reconnect_s=5.0)
    stack.push_async_callback(judge.close)
    await judge.ready()
    return GuardedChat(judge, upstream, Printer(sys.stdout, False, arguments.color), notes.line)


def _typed(notes: Printer) -> Iterator[str]:
    """Lines that somebody types, until the end of input."""
    with suppress(ImportError):
        import readline  # noqa: F401  (input() then edits and remembers lines)
    while True:
        try:
            line = input("> ").strip()
        except KeyboardInterrupt:
            notes.line(f"\n{_HELP}")
        except EOFError:
            notes.line("")
            return
        else:
            if line:
                yield line


def _lines() -> Iterator[str]:
    for line in sys.stdin:
        if text := line.strip():
            yield text
