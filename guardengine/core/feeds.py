"""What is fed for a message or a piece of one: content, the template's tokens around it, and the labels wanted.

Pure functions from (template, stream so far, content) to a `Feed`. A stream opened from messages knows its
turns, so it always knows which template tokens come next; a stream opened from token ids gets exactly the ids
that the caller gives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from guardengine.core.state import StreamState, Turn, Wanted
from guardengine.errors import ConfigError, InvalidText, InvalidTokens
from guardengine.labels import Role
from guardengine.text.chat_template import ChatTemplate


class Feed(NamedTuple):
    """Tokens to accept, the labels wanted at them, and the stream's turns afterwards (None: raw token ids)."""

    token_ids: list[int]
    wanted: list[Wanted]
    turns: tuple[Turn, ...] | None


def feed_ids(token_ids: list[int], role: Role, start: int = 0) -> Feed:
    """Feed raw ids from position `start` on: one label at the end of a user's, one for each of an assistant's."""
    check_role(role)
    end = start + len(token_ids)
    first = end - 1 if role == "user" else start
    return Feed(token_ids, [Wanted(position, role) for position in range(first, end)], None)


def feed_messages(
    chat: ChatTemplate, messages: Sequence[Mapping[str, Any]] | None, *, is_complete: bool, max_tokens: int
) -> Feed:
    """Feed a conversation from its start to the end of its last message.

    The last message, when it is the assistant's, is the response whose tokens are labelled; `is_complete` says
    whether its <|im_end|> is fed (and labelled) too or more of it may follow. Text that cannot fit into
    `max_tokens` is refused early.
    """
    rendered = chat.render(messages or [], max_tokens=max_tokens)
    if messages and messages[-1]["role"] == "system":  # there is no position to read it at
        raise InvalidText(
            f"messages[{len(messages) - 1}]: a conversation must not end with a system message, which would go unread; "
            "put it before the last user turn"
        )
    prompt_end = rendered.prompt_end
    wanted = [Wanted(prompt_end, "user")]
    turns: tuple[Turn, ...] = (Turn("user", 0, prompt_end, True),)
    end = prompt_end + 1
    if rendered.response_start is not None and rendered.response_end is not None:
        end = rendered.response_end if is_complete else rendered.response_end - 1
        wanted += [Wanted(position, "assistant") for position in range(rendered.response_start, end)]
        turns += (Turn("assistant", rendered.response_start, end, is_complete),)
    return Feed(rendered.token_ids[:end], wanted, turns)


def feed_more(chat: ChatTemplate | None, state: StreamState, content: list[int], role: Role) -> Feed:
    """Feed more content to a stream: the rest of the assistant's turn, or a new turn of either role."""
    start = state.num_tokens
    if state.turns is None or chat is None:
        return feed_ids(content, role, start)
    check_role(role)
    closes = role == "assistant" and content[-1] == chat.end_of_turn_id
    for index, token_id in enumerate(content[:-1] if closes else content):
        if token_id in chat.control_ids:
            raise InvalidTokens(
                f"token id {token_id} at index {index} is a control token; on a stream opened from messages the "
                f"engine feeds the template, so pass content only (an assistant's reply may end with "
                f"{chat.end_of_turn_id}), or open the stream from token ids"
            )
    last = state.turns[-1]
    if role == "user":
        template = chat.user_preamble()[1 if last.is_closed else 0 :]  # its first token closes an open turn
        start += len(template)
        end = start + len(content)
        return Feed(
            [*template, *content, chat.end_of_turn_id],
            [Wanted(end, "user")],
            (*state.turns, Turn("user", start, end, True)),
        )
    check_reply_open(state)
    if last.role == "assistant":
        template, turns, first = [], state.turns[:-1], last.start
    else:
        template = chat.assistant_preamble(thinks=content[0] == chat.think_id)
        turns, first = state.turns, start + len(template)
    start += len(template)
    end = start + len(content)
    return Feed(
        [*template, *content],
        [Wanted(position, "assistant") for position in range(start, end)],
        (*turns, Turn("assistant", first, end, closes)),
    )


def cut(state: StreamState, num_tokens: int) -> tuple[tuple[Turn, ...] | None, int]:
    """The turns of a stream whose last `num_tokens` tokens are dropped, and how many tokens stay.

    Raises InvalidTokens where there are fewer or the template would break.
    """
    if isinstance(num_tokens, bool) or not isinstance(num_tokens, int | np.integer):
        raise InvalidTokens(f"rollback of {num_tokens!r} tokens: a whole number is needed")
    remaining = state.num_tokens - int(num_tokens)
    if not 0 <= remaining <= state.num_tokens:
        raise InvalidTokens(f"{state.stream_id}: cannot roll back {num_tokens} of {state.num_tokens} tokens")
    return (None, remaining) if state.turns is None else cut_turns(state.turns, remaining)


def cut_turns(turns: tuple[Turn, ...], num_tokens: int) -> tuple[tuple[Turn, ...], int]:
    """The turns of a stream cut to `num_tokens` tokens, and how many tokens stay: a reply of which nothing is left
    loses its header too, since the next reply may want another one (with or without a think block).

    Raises InvalidTokens where the cut would leave a part of the template or of a prompt.
    """
    for index in range(len(turns) - 1, -1, -1):
        turn = turns[index]
        if num_tokens < turn.start:
            continue
        whole_turn = turn.end + (turn.role == "user")  # a user turn stands only with its <|im_end|>
        if num_tokens == whole_turn:
            return turns[: index + 1], num_tokens
        if turn.role == "assistant" and num_tokens == turn.start:
            return turns[:index], turns[index - 1].end + 1
        if turn.role == "assistant" and num_tokens < turn.end:
            return (*turns[:index], Turn("assistant", turn.start, num_tokens, False)), num_tokens
        break
    raise InvalidTokens(
        f"cutting the stream to {num_tokens} tokens would leave a broken turn; only tokens of an assistant's turn "
        f"can be dropped, or whole turns (content starts at {[turn.start for turn in turns]}, ends at "
        f"{[turn.end for turn in turns]}); for another prompt open a new stream"
    )


def check_reply_open(state: StreamState) -> None:
    """Raise InvalidTokens where no reply can go on or begin, because the last one has ended."""
    if state.turns and state.turns[-1].role == "assistant" and state.turns[-1].is_closed:
        raise InvalidTokens(
            "the assistant's turn has ended with <|im_end|>; append the next user turn (role='user') first"
        )


def check_role(role: str) -> None:
    if role not in ("user", "assistant"):
        raise ConfigError(f"role={role!r}: 'user' or 'assistant' is needed")
