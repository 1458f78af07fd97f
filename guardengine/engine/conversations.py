"""Whole conversations on their way to an answer: each rendered and checked, before anything runs, and what of them is
unfit kept apart. For Engine and AsyncEngine, and for any thread."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar, get_args

from guardengine.core.admission import check_timeout
from guardengine.core.engine_core import EngineCore
from guardengine.core.feeds import Feed, feed_messages
from guardengine.core.state import Turn, Wanted
from guardengine.core.text_feeding import LONG_CHARS, check_length
from guardengine.engine.moderator import OnUnfit, Unfit
from guardengine.engine.opening import Messages
from guardengine.errors import ConfigError, InvalidText, InvalidTokens, StreamTooLong
from guardengine.gen.answering import Answering
from guardengine.gen.answers import Mode
from guardengine.policy import Policy
from guardengine.text.chat_template import ChatTemplate
from guardengine.text.spans import HeldText, Piece, Span

S = TypeVar("S")
T = TypeVar("T")


class Whole(NamedTuple):
    """A finished conversation, rendered. spans: where each token of the reply stands in the last message's content,
    None where that is not known; None altogether where they were not asked for."""

    feed: Feed
    spans: list[Span | None] | None


class Options(NamedTuple):
    """How `moderate_many` goes about it; `Engine.moderate_many` says what each means."""

    mode: Mode | None = None
    tenant: str = ""
    timeout_s: float | None = None
    spans: bool = False
    on_unfit: OnUnfit = "raise"


class Prepared(NamedTuple):
    """Conversations that are rendered, for a Stream checkpoint or a Gen one; of an unfit one the error."""

    policy: Policy
    items: list[Any]  # Whole | Unfit, or Prompt | Unfit
    mode: Mode


def check_options(kind: str, conversations: object, options: Options) -> None:
    """Raise ConfigError for options that are wrong, or not of this kind of checkpoint; InvalidText for what is no list
    of conversations."""
    if options.on_unfit not in ("raise", "return"):
        raise ConfigError(f"on_unfit={options.on_unfit!r}: choose 'raise' or 'return'")
    if kind == "stream" and options.mode is not None:
        raise ConfigError(
            f"mode={options.mode!r} is of Gen checkpoints, and this is a Stream one; leave it out"
        )
    if options.mode not in (None, *get_args(Mode)):
        raise ConfigError(f"mode={options.mode!r}: choose one of {', '.join(get_args(Mode))}")
    if kind == "gen" and (options.tenant or options.timeout_s is not None or options.spans):
        raise ConfigError(
            "tenant, timeout_s and spans are of Stream checkpoints, and this is a Gen one; leave them out"
        )
    if options.timeout_s is not None:
        check_timeout(options.timeout_s)
    if not isinstance(conversations, list | tuple):
        raise InvalidText(
            f"conversations is {type(conversations).__name__}; a list of message lists is needed"
        )


def each_fit(items: Iterable[S | Unfit], prepare: Callable[[S], T], on_unfit: OnUnfit) -> list[T | Unfit]:
    """What each item is prepared to. Of one that is unfit the error: raised, naming it, or in its place."""
    prepared: list[T | Unfit] = []
    for index, item in enumerate(items):
        if isinstance(item, InvalidTokens | StreamTooLong):
            prepared.append(item)
            continue
        try:
            prepared.append(prepare(item))
        except (InvalidTokens, StreamTooLong) as error:
            if on_unfit == "raise":
                raise type(error)(f"conversations[{index}]: {error}") from None
            prepared.append(error)
    return prepared


def check_lengths(
    core: EngineCore, answering: Answering | None, prepared: Prepared, on_unfit: OnUnfit
) -> list[Any]:
    """Those of the prepared conversations that can be computed, and errors in the places of others. For the engine's
    thread."""

    def check(each: Any) -> Any:
        if answering is None:
            core.check_length(len(each.feed.token_ids), is_new=True)
        else:
            answering.check_length(each, prepared.mode)
        return each

    return each_fit(prepared.items, check, on_unfit)


def fit(prepared: Iterable[T | Unfit]) -> list[T]:
    """Those that are no errors."""
    return [each for each in prepared if not isinstance(each, InvalidTokens | StreamTooLong)]


def in_place(prepared: Iterable[Any], answers: Iterable[S]) -> list[S | Unfit]:
    """The answers to `fit(prepared)`, errors between them where they were."""
    rest = iter(answers)
    return [each if isinstance(each, InvalidTokens | StreamTooLong) else next(rest) for each in prepared]


def feed_whole(chat: ChatTemplate, messages: Messages, max_tokens: int, *, spans: bool) -> Whole:
    """Render a finished conversation. With `spans` a plain reply is fed as `append_text` does, which places its tokens.

    Raises InvalidText or StreamTooLong.
    """
    reply, num_dropped = _plain_reply(messages) if spans else (None, 0)
    if reply is None:
        feed = feed_messages(chat, messages, is_complete=True, max_tokens=max_tokens)
        num_labels = sum(wanted.role == "assistant" for wanted in feed.wanted)
        return Whole(feed, [None] * num_labels if spans else None)
    chat.tokenizer.check_text(reply)
    if len(reply) > LONG_CHARS:
        check_length(chat, Piece(reply), max_tokens)
    prompt = feed_messages(chat, messages[:-1], is_complete=False, max_tokens=max_tokens)
    token_ids, offsets, held = chat.retokenizer.feed(HeldText(), reply, is_final=True)
    template = chat.assistant_preamble()
    start = len(prompt.token_ids) + len(template)
    end = start + len(token_ids) + 1
    places = [*offsets, (held.num_chars, held.num_chars, held.num_bytes, held.num_bytes)]
    feed = Feed(
        [*prompt.token_ids, *template, *token_ids, chat.end_of_turn_id],
        [*prompt.wanted, *(Wanted(position, "assistant") for position in range(start, end))],
        (*(prompt.turns or ()), Turn("assistant", start, end, True)),
    )
    return Whole(feed, [Span(*(place + num_dropped for place in each)) for each in places])


def _plain_reply(messages: Messages) -> tuple[str | None, int]:
    """A last reply that may be fed as text, and how many newlines before it the template drops.

    Replies that the template takes apart, or that would be tokenized together with what it writes before them, are
    rendered with the rest, so that every conversation has the ids that it has without spans.
    """
    if not isinstance(messages, Sequence) or not all(isinstance(message, Mapping) for message in messages):
        return None, 0
    if len(messages) < 2 or messages[-1].get("role") != "assistant":
        return None, 0
    if messages[-2].get("role") not in ("user", "tool"):
        return None, 0
    last = messages[-1]
    content = last.get("content")
    if not isinstance(content, str) or any(
        value is not None for name, value in last.items() if name not in ("role", "content")
    ):
        return None, 0
    text = content.lstrip("\n")  # as the template does
    if not text or text[0].isspace() or "<think>" in text or "</think>" in text:
        return None, 0
    return text, len(content) - len(text)
