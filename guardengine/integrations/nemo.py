"""Rails for NeMo Guardrails: actions for input and output rails, and whole streams, token by token.

A configuration's config.py says who judges, and its Colang flows what follows (examples/nemo_config has them):

    def init(app):
        register(app, Guard(os.environ["GUARDENGINE_URL"]))

NeMo's own streaming of output rails (rails.output.streaming) hands an action windows of `chunk_size` chunks, with
`context_size` before them: each is judged as a reply of its own. `stream_guarded` judges the reply as it grows instead.
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

    Both return a RailOutcome: blocked where the verdict's action is "block", with risk, category and rule in its
    metadata. The output rail judges the conversation, so it blocks also where the prompt is unsafe. NeMo passes earlier
    turns, but not where it streams. A conversation that could not be judged blocks (RailOutcome.failure), because rails
    in parallel let exceptions pass; `Guard(on_unreachable="open")` is the way to let a lost server pass.
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
    """Register the actions with an LLMRails, as in a config.py's `init`."""
    for function in actions(guard):
        app.register_action(function, function.action_meta["name"])  # type: ignore[attr-defined]


async def stream_guarded(
    rails: Any, guard: Guard, messages: Sequence[Mapping[str, Any]], **options: Any
) -> AsyncGenerator[Any, None]:
    """`rails.stream_async(messages=messages, **options)`, of which what is cleared comes out, token by token.

    Where the conversation is blocked the last chunk is NeMo's JSON of an error, code "content_blocked", as of its own
    rails. The configuration needs no output rail of guardengine's then. NeMo ends its generation in its own time.
    Raises what `Guard` raises.
    """
    # NeMo's messages of context and events are no part of the conversation.
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
    """The conversation up to the latest user turn. NeMo passes its events, but not where it streams."""
    from nemoguardrails.llm.filters import to_chat_messages

    latest = user_message if user_message is not None else (context or {}).get("user_message")
    found: list[dict[str, Any]] = to_chat_messages(list(events or ()))
    if found and found[-1] == {"role": "user", "content": latest}:
        found.pop()  # there when output rails run, and not yet when input rails do
    return [*found, {"role": "user", "content": latest or ""}]


def _chunk_text(chunk: Any) -> str | None:
    text = chunk.get("text") if isinstance(chunk, Mapping) else chunk
    if text is None or isinstance(text, str):
        return text
    raise ConfigError(
        f"a chunk of the stream is {type(chunk).__name__}; text, or a dict with text, is needed"
    )


def _split(chunk: Any, num_chars: int) -> tuple[Any, Any]:
    text = _chunk_text(chunk) or ""
    if isinstance(chunk, Mapping):
        return {**chunk, "text": text[:num_chars]}, {**chunk, "text": text[num_chars:]}
    return text[:num_chars], text[num_chars:]
