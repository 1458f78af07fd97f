"""From rows to outcomes: one forward over each conversation with a Stream checkpoint, one answer with a Gen
checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, NamedTuple, TypeVar

from guardengine.core.feeds import Feed
from guardengine.core.state import Wanted
from guardengine.core.whole_streams import run_feeds
from guardengine.engine.engine import Engine
from guardengine.engine.moderator import Moderator
from guardengine.errors import ConfigError, InvalidText, InvalidTokens, StreamTooLong
from guardengine.evaluate.outcomes import Outcome, Target, gen_outcome, stream_outcome
from guardengine.evaluate.rows import BadRows, Row
from guardengine.labels import GenModeration, Role
from guardengine.policy import Policy
from guardengine.text.chat_template import ChatTemplate
from guardengine.text.thinking import split_thinking

CONVERSATIONS_AT_A_TIME = 16

TargetOption = Literal["auto", "prompt", "response"]
T = TypeVar("T")
Progress = Callable[[int], object]  # called with the amount of work that was done


class Judged(NamedTuple):
    """A conversation for a Stream checkpoint.

    Attributes:
        row: The row.
        target: Whether its prompt or its response is judged.
        token_ids: The tokens of the conversation.
        start: Index of the first token whose label is judged; all after it are too.
        num_reply_labels: How many of these belong to the reply itself, its <|im_end|> included.
        has_own_ids: See `Outcome`.
    """

    row: Row
    target: Target
    token_ids: list[int]
    start: int
    num_reply_labels: int
    has_own_ids: bool


@dataclass(frozen=True, slots=True)
class Aim:
    """What is judged in a conversation.

    Attributes:
        target: "prompt", "response", or "auto" for the last message, whichever it is.
        thinking: Judge reasoning together with the response that it belongs to. Otherwise it is only context.
    """

    target: TargetOption = "auto"
    thinking: bool = True

    def of(self, row: Row) -> Target:
        """What is judged in a row. Raises InvalidText when it has no such message."""
        roles = [message.get("role") for message in row.messages]
        if self.target == "response" and roles[-1] != "assistant":
            raise InvalidText(
                f"the last message is of role {roles[-1]!r}; --target response needs an assistant's message at the end"
            )
        if self.target == "auto":
            return "response" if roles[-1] == "assistant" else "prompt"
        return self.target


def lay_out(
    rows: Sequence[Row], aim: Aim, chat: ChatTemplate, max_tokens: int, bad_rows: BadRows, progress: Progress
) -> list[Judged]:
    """Render conversations for a Stream checkpoint. A conversation that cannot be rendered or is too long is a bad
    row. `progress` is called with numbers of rows."""
    laid_out = []
    for row in rows:
        try:
            laid_out.append(_lay_out(row, aim, chat, max_tokens))
        except (InvalidTokens, StreamTooLong) as error:
            bad_rows.add(row.where, error)
        progress(1)
    return laid_out


def _lay_out(row: Row, aim: Aim, chat: ChatTemplate, max_tokens: int) -> Judged:
    target = aim.of(row)
    rendered = chat.render(row.messages, max_tokens=max_tokens)
    ids = rendered.token_ids
    if target == "prompt":
        start = rendered.prompt_end
        end = window_end = start + 1
    elif rendered.response_start is None or rendered.response_end is None:
        raise InvalidText("the conversation has no response at its end")
    else:
        start, end = rendered.response_start, rendered.response_end
        window_end = min(end + 1, len(ids))  # the script's window also has the newline after <|im_end|>
        if not aim.thinking:
            start = _behind_thinking(ids, start, end, chat)
    if window_end > max_tokens:
        raise StreamTooLong(
            f"the conversation has {window_end} tokens and the checkpoint reads {max_tokens}; shorten it"
        )
    has_own_ids = row.token_ids is not None and row.token_ids != ids
    return Judged(row, target, ids[:window_end], start, end - start, has_own_ids)


def _behind_thinking(ids: list[int], start: int, end: int, chat: ChatTemplate) -> int:
    """Where the answer begins: after the </think> that the template wrote, and the newlines after it. Content cannot
    have this id, because it is encoded as plain text."""
    closing = chat.tokenizer.added_tokens.get("</think>")
    if closing is None or closing not in ids[start:end]:
        return start
    return min(ids.index(closing, start, end) + 2, end - 1)


def judge_stream(engine: Engine, conversations: Sequence[Judged], progress: Progress) -> list[Outcome]:
    """The outcomes of rendered conversations, in order, with one forward each and a few conversations at a time.
    `progress` is called with numbers of tokens."""
    outcomes: list[Outcome] = []
    policy = Policy.strict()  # every stream needs one; these verdicts are not used
    for batch in _batches(conversations, CONVERSATIONS_AT_A_TIME):
        feeds = [Feed(each.token_ids, _wanted(each), None) for each in batch]
        for each, state in zip(batch, run_feeds(engine.core, feeds, policy), strict=True):
            labels = state.prompt_labels if each.target == "prompt" else state.labels
            outcomes.append(
                stream_outcome(
                    each.row, each.target, labels, each.num_reply_labels, has_own_ids=each.has_own_ids
                )
            )
        progress(sum(len(each.token_ids) for each in batch))
    return outcomes


def _wanted(judged: Judged) -> list[Wanted]:
    role: Role = "user" if judged.target == "prompt" else "assistant"
    return [Wanted(position, role) for position in range(judged.start, len(judged.token_ids))]


def judge_gen(
    engine: Moderator, rows: Sequence[Row], aim: Aim, bad_rows: BadRows, progress: Progress
) -> list[Outcome]:
    """The outcomes of rows under a Gen checkpoint, in order. `progress` is called with numbers of rows."""
    outcomes: list[Outcome] = []
    for batch in _batches(rows, CONVERSATIONS_AT_A_TIME):
        usable: list[tuple[Row, Target, list[dict[str, Any]]]] = []
        for row in batch:
            try:
                target = aim.of(row)
                usable.append((row, target, _gen_messages(row, target, aim)))
            except InvalidText as error:
                bad_rows.add(row.where, error)
        answers = engine.moderate_many([messages for _, _, messages in usable], on_unfit="return")
        for (row, target, _), answer in zip(usable, answers, strict=True):
            if isinstance(answer, InvalidTokens | StreamTooLong):
                bad_rows.add(row.where, answer)
            elif isinstance(answer, GenModeration):
                outcomes.append(gen_outcome(row, target, answer))
            else:
                raise ConfigError(f"{type(answer).__name__} is not a Gen checkpoint's answer")
        progress(len(batch))
    return outcomes


def _gen_messages(row: Row, target: Target, aim: Aim) -> list[dict[str, Any]]:
    """A conversation that ends with the message to judge. Gen's template reads only content, so reasoning is put into
    it."""
    messages = row.messages
    if target == "prompt":
        roles = [message.get("role") for message in messages]
        if "user" not in roles:
            raise InvalidText("no message is of role 'user'; there is no prompt to judge")
        return messages[: len(roles) - roles[::-1].index("user")]
    last = dict(messages[-1])
    reasoning, content = last.pop("reasoning_content", ""), last.get("content")
    if not isinstance(content, str) or not isinstance(reasoning, str):
        raise InvalidText("the response's content is not text")
    if not aim.thinking:
        last["content"] = split_thinking(content)[1]
    elif reasoning:
        last["content"] = f"<think>\n{reasoning}\n</think>\n\n{content}"
    return [*messages[:-1], last]


def _batches(items: Sequence[T], size: int) -> Iterator[list[T]]:
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch
