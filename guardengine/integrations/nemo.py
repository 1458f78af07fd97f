"""Rails for NeMo Guardrails: actions for input and output rails, and whole streams, token by token.

A configuration's config.py says which guard judges, and its Colang flows what happens then (an example is
examples/nemo_config):

    def init(app):
        register(app, Guard(os.environ["GUARDENGINE_URL"]))

NeMo's own streaming of output rails (rails.output.streaming) gives an action windows of `chunk_size` chunks, with
`context_size` chunks before them, and each window is judged as a separate reply. `stream_guarded` judges the reply as
it grows instead.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from typing import Any

from nemoguardrails.actions import action
from nemoguardrails.actions.rail_outcome import RailOutcome

from guardengine.errors import Blocked, ConfigError, GuardEngineError
from guardengine.integrations.guard import Guard
from guardengine.integrations.openai import text_messages
from guardengine.labels import Verdict

INPUT, OUTPUT = "guardengine_check_input", "guardengine_check_output"
Action = Callable[..., Awaitable[RailOutcome]]


def actions(guard: Guard) -> tuple[Action, Action]:
    """The actions of input and output rails, guardengine_check_input and guardengine_check_output.

    Both return a RailOutcome. It is blocked where the verdict's action is "block", with risk, category and rule in its
    metadata. The output rail judges the whole conversation, so it also blocks where the prompt is unsafe. NeMo passes
    earlier turns to the actions, but not where it streams. A conversation that could not be judged is blocked
    (RailOutcome.failure), because rails that run in parallel ignore exceptions; to let conversations pass while a
    server cannot be reached use `Guard(on_unreachable="open")`.

    Args:
        guard: The guard that judges.

    Returns:
        The input action and the output action.
    """

    @action(name=INPUT, is_system_action=True)
    async def check_input(
        context: Mapping[str, Any] | None = None,
        events: Sequence[Mapping[str, Any]] | None = None,
        user_message: str | None = None,
        **_: Any,
    ) -> RailOutcome:
        return await _judge(guard, _messages(context, events, user_message), None)

    @action(name=OUTPUT, is_system_action=True)
    async def check_output(
        context: Mapping[str, Any] | None = None,
        events: Sequence[Mapping[str, Any]] | None = None,
        user_message: str | None = None,
        bot_message: str | None = None,
        **_: Any,
    ) -> RailOutcome:
        reply = bot_message if bot_message is not None else (context or {}).get("bot_message")
        return await _judge(guard, _messages(context, events, user_message), reply or "")

    return check_input, check_output


def register(app: Any, guard: Guard) -> None:
    """Register both actions, from the `init` of a config.py.

    Args:
        app: An LLMRails.
        guard: The guard that judges.
    """
    for function in actions(guard):
        app.register_action(function, function.action_meta["name"])  # type: ignore[attr-defined]


async def stream_guarded(
    rails: Any, guard: Guard, messages: Sequence[Mapping[str, Any]], **options: Any
) -> AsyncGenerator[Any, None]:
    """Stream a reply from `rails.stream_async`, and yield only what is cleared, token by token.

    When the conversation is blocked the last chunk is NeMo's JSON of an error with the code "content_blocked", as its
    own rails send it. The configuration then needs no output rail of guardengine. NeMo does not stop its generation at
    once.

    Args:
        rails: An LLMRails.
        guard: The guard that judges.
        messages: The conversation. NeMo's messages with context and events are not judged.
        **options: Further arguments of stream_async.

    Yields:
        Chunks of stream_async.

    Raises:
        GuardEngineError: The errors of `Guard.show`.
    """
    # NeMo's messages with context and events are no part of the conversation.
    talk = [m for m in messages if m.get("role") in ("system", "user", "assistant", "tool")]
    source = rails.stream_async(messages=list(messages), **options)
    shown = guard.show(source, text_messages(talk), text=_chunk_text, split=_split, check_prompt="beside")
    try:
        async for chunk in shown:
            yield chunk
    except Blocked as blocked:
        error = {
            "message": f"Blocked by guardengine rails: {blocked}",
            "type": "guardrails_violation",
            "param": "guardengine",
            "code": "content_blocked",
        }
        yield json.dumps({"error": error})
    finally:
        await shown.aclose()


async def _judge(guard: Guard, messages: Sequence[Mapping[str, Any]], reply: str | None) -> RailOutcome:
    try:
        verdict = await guard.judge(text_messages(messages), reply)
    except GuardEngineError as error:
        return RailOutcome.failure(reason=str(error), metadata={"error": type(error).__name__})
    return _outcome(verdict)


def _outcome(verdict: Verdict) -> RailOutcome:
    metadata = {name: getattr(verdict, name) for name in ("action", "risk", "category", "rule")}
    if verdict.action == "block":
        return RailOutcome.block(reason=str(Blocked.by(verdict)), metadata=metadata)
    return RailOutcome.allow(metadata=metadata)


def _messages(
    context: Mapping[str, Any] | None, events: Sequence[Mapping[str, Any]] | None, user_message: str | None
) -> list[dict[str, Any]]:
    """The conversation up to the latest user turn, from the events that NeMo passes (it passes none where it
    streams)."""
    from nemoguardrails.llm.filters import to_chat_messages

    latest = user_message if user_message is not None else (context or {}).get("user_message")
    earlier: list[dict[str, Any]] = to_chat_messages(list(events or ()))
    # The latest turn is among the events when output rails run, and not yet when input rails do.
    if earlier and earlier[-1] == {"role": "user", "content": latest}:
        earlier.pop()
    return [*earlier, {"role": "user", "content": latest or ""}]


def _chunk_text(chunk: Any) -> str | None:
    text = chunk.get("text") if isinstance(chunk, Mapping) else chunk
    if text is None or isinstance(text, str):
        return text
    raise ConfigError(
        f"a chunk of the stream is {type(chunk).__name__}; only text, or a dict with text, can be guarded"
    )


def _split(chunk: Any, num_chars: int) -> tuple[Any, Any]:
    text = _chunk_text(chunk) or ""
    if isinstance(chunk, Mapping):
        return {**chunk, "text": text[:num_chars]}, {**chunk, "text": text[num_chars:]}
    return text[:num_chars], text[num_chars:]
