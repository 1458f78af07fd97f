"""Stream: the handle that users hold on one conversation. Checks nothing and computes nothing itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from guardengine.core.engine_core import EngineCore
from guardengine.core.feeds import feed_more
from guardengine.core.state import StreamState
from guardengine.core.text_feeding import (
    accept_text,
    accepted_chars,
    check_nothing_held,
    cleared_chars,
    cut_before,
    held_text,
    span_of,
)
from guardengine.errors import InvalidText
from guardengine.labels import Label, Role, Verdict
from guardengine.records.snapshot import take_snapshot
from guardengine.text.chat_template import ChatTemplate
from guardengine.text.spans import Piece, Span


class StreamView:
    """What can be read of a stream, from any thread and after close."""

    def __init__(self, state: StreamState) -> None:
        self._state = state

    @property
    def stream_id(self) -> str:
        return self._state.stream_id

    @property
    def is_closed(self) -> bool:
        return self._state.is_closed

    @property
    def token_ids(self) -> list[int]:
        """All ids fed so far, the template's included."""
        return self._state.token_ids.tolist()

    @property
    def num_tokens(self) -> int:
        """How many ids were fed so far."""
        return self._state.num_tokens

    @property
    def num_pending_tokens(self) -> int:
        """Tokens accepted and not yet computed."""
        return self._state.num_pending_tokens

    @property
    def prompt_label(self) -> Label | None:
        """The label of the latest user turn, read at its end; None while it is pending."""
        state = self._state
        # Copied first: the engine's thread may be at work on it.
        if any(wanted.role == "user" for wanted in state.wanted[:]) or not state.prompt_labels:
            return None
        return state.prompt_labels[-1]

    @property
    def labels(self) -> list[Label]:
        """The labels of the assistant tokens so far, in order."""
        return self._state.labels[:]

    @property
    def num_labels(self) -> int:
        """How many `labels` there are so far."""
        return len(self._state.labels)

    def labels_from(self, start: int) -> list[Label]:
        """`labels[start:]`, without a copy of those before.

        Args:
            start: Index of the first, from 0.
        """
        return self._state.labels[start:]

    @property
    def num_assistant_tokens(self) -> int:
        """How many tokens have a label in `labels`, or will have one. `verdict.cleared` counts these."""
        return self._state.num_assistant_tokens

    @property
    def verdict(self) -> Verdict:
        """What the stream's policy makes of the labels so far."""
        return self._state.verdict

    def span(self, at: Label | int) -> Span | None:
        """Where a token stands in the text of its reply.

        Args:
            at: The token's label, or its position in the stream.

        Returns:
            Characters and bytes from the beginning of the reply; None for a token that was not fed as text. The
            <|im_end|> of `finish_text` has an empty span at the end.
        """
        return span_of(self._state, at)

    @property
    def cleared_chars(self) -> int:
        """How many characters of the latest reply's text may be shown: those wholly in tokens that
        `verdict.cleared` counts."""
        return cleared_chars(self._state, self.verdict.cleared)

    def chars_within(self, num_tokens: int) -> int:
        """How many characters of the latest reply's text are wholly in the stream's first assistant tokens.

        Args:
            num_tokens: How many of these tokens.
        """
        return cleared_chars(self._state, num_tokens)

    def cut_before(self, num_tokens: int) -> tuple[int, int]:
        """Where to cut the latest reply's text.

        Args:
            num_tokens: How many assistant tokens of the stream may stay.

        Returns:
            How many assistant tokens stay, the last of which ends with a character, and how many characters of the
            reply they have.
        """
        return cut_before(self._state, num_tokens)

    @property
    def accepted_chars(self) -> int:
        """How many characters the latest reply has so far, those that are held back included."""
        return accepted_chars(self._state)

    @property
    def held_text(self) -> str:
        """What `append_text` was given and holds back."""
        return held_text(self._state)

    @property
    def can_end_turn(self) -> bool:
        """Whether there is an <|im_end|> to feed: on a stream opened from messages, unless its reply has ended."""
        turns = self._state.turns
        return turns is not None and not (turns[-1].role == "assistant" and turns[-1].is_closed)

    def __repr__(self) -> str:
        state = self._state
        status = "closed" if state.is_closed else f"{state.num_pending_tokens} pending"
        return f"<{type(self).__name__} {state.stream_id}: {state.num_tokens} tokens, {status}>"


class Stream(StreamView):
    """A handle on one conversation in an engine. Made by `Engine.open` and `Stream.fork`.

    Also a context manager that closes it. Methods are for the engine's thread; properties may be read from any, and
    after close.
    """

    def __init__(self, core: EngineCore, chat: ChatTemplate | None, state: StreamState) -> None:
        super().__init__(state)
        self._core, self._chat = core, chat

    def append(
        self, token_ids: Sequence[int], role: Role = "assistant", *, timeout_s: float | None = None
    ) -> None:
        """Accept more tokens; `Engine.step` computes them.

        Args:
            token_ids: Qwen3 ids. On a stream opened from messages they are a message's content, and the template's
                tokens around it are added here; an assistant's reply may end with <|im_end|>, which closes it, and may
                begin with <think> when the LLM reasons. On a stream opened from token ids they are fed as they are.
            role: "assistant": every token gets a label. "user": a further user turn, with one prompt label at its end.
            timeout_s: Seconds. Tokens that are not computed by then count as unjudged, which is the policy's
                `on_timeout`; they are computed and labelled all the same.

        Raises:
            InvalidTokens: An id cannot be fed, or text is still held back (see `append_text`). The stream is unchanged
                after any error.
            StreamTooLong: The stream would become longer than `max_model_len`, or than the KV cache.
            Overloaded: There is no room for the tokens now.
            ConfigError: The role or the time is wrong.
            StreamClosed: The stream or the engine is closed.
        """
        core, state = self._core, self._state
        with core.gate:
            core.check_open(state)
            check_nothing_held(state)
            ids = core.check_token_ids(token_ids)
            core.accept(state, feed_more(self._chat, state, ids, role), timeout_s)

    def append_text(
        self, delta: str | bytes, *, is_final: bool = False, timeout_s: float | None = None
    ) -> None:
        """Accept more of the assistant's reply as text, from an LLM with any tokenizer, in pieces of any size.

        The ids that are fed are at any time the first ids of the whole reply's text, and at its end all of them. What
        more text could still split in another way is held back: as a rule the last word, at most 256 characters (a
        longer run without a place to cut is cut there; see retokenizer.py). Text that is held back is not judged, so do
        not show it: `cleared_chars` never counts it. Text that follows ids, a message's beginning or a rollback is
        tokenized as if it began there. Special tokens spelled in text are text.

        Args:
            delta: The next piece. Bytes are UTF-8 and may be cut within a character; what is not UTF-8 becomes U+FFFD.
            is_final: Whether the reply ends here, as if `finish_text` followed.
            timeout_s: Seconds, as in `append`, for what is fed now.

        Raises:
            InvalidText: `delta` has another type, or lone surrogates. The stream is unchanged after any error.
            ConfigError: The checkpoint has no tokenizer, or the time is wrong.
            StreamTooLong, Overloaded, StreamClosed: As in `append`.
        """
        self._accept(Piece(delta, is_final=is_final, ends_turn=is_final), timeout_s)

    def append_foreign_ids(
        self, token_ids: Sequence[int], tokenizer: Any, *, timeout_s: float | None = None
    ) -> None:
        """Accept more of the reply as ids of another tokenizer: `append_text` of the text that they decode to.

        A character that is not complete waits for the next ids.

        Args:
            token_ids: Ids of `tokenizer`.
            tokenizer: The LLM's, anything with decode(ids) -> str (`tokenizers.Tokenizer`, transformers'). What its
                decode leaves out, such as its own end of text, is left out here.
            timeout_s: Seconds, as in `append`, for what is fed now.

        Raises:
            InvalidTokens: The tokenizer refuses the ids. The stream is unchanged after any error.
            GuardEngineError: For the rest, as `append_text`.
        """
        self._accept(Piece.of_foreign(token_ids, tokenizer), timeout_s)

    def finish_text(self, *, end_turn: bool = True, timeout_s: float | None = None) -> None:
        """Feed what `append_text` holds back, and the reply's <|im_end|>: the label there has seen the whole reply.

        Args:
            end_turn: Whether to feed the <|im_end|>; without it the reply stays open. On a stream opened from token
                ids, whose caller owns the template, none is fed.
            timeout_s: Seconds, as in `append`, for what is fed now.

        Raises:
            GuardEngineError: As `append_text`.
        """
        self._accept(Piece(is_final=True, ends_turn=end_turn), timeout_s)

    def _accept(self, piece: Piece, timeout_s: float | None) -> None:
        with self._core.gate:
            accept_text(self._core, self._chat, self._state, piece, timeout_s)

    def fork(self, stream_id: str | None = None) -> Stream:
        """Branch off a stream with the same tokens, labels and verdict, sharing the computed KV blocks.

        Labels that the parent has emitted are the branch's too and keep the parent's stream_id; labels that are
        still pending will be emitted by both. Text that is held back is held back by both.

        Args:
            stream_id: The branch's name; by default one that is not in use.

        Returns:
            The branch's handle.

        Raises:
            Overloaded: There is no free place or block now.
            ConfigError: The stream_id is in use.
            StreamClosed: The stream or the engine is closed.
        """
        with self._core.gate:
            return Stream(self._core, self._chat, self._core.fork(self._state, stream_id))

    def rollback(self, num_tokens: int) -> None:
        """Drop the last `num_tokens` tokens with their labels, and what the policy concluded from them.

        Args:
            num_tokens: How many, from 0. On a stream opened from messages tokens of a reply can be dropped, or whole
                turns; with a reply's first token its header goes too.

        Raises:
            InvalidTokens: There are not so many, or the cut would be within the template's tokens.
            StreamClosed: The stream or the engine is closed.
        """
        with self._core.gate:
            self._core.rollback(self._state, num_tokens)

    def snapshot(self) -> dict[str, Any]:
        """The stream as a small JSON value with which `Engine.restore` goes on, in this process or another.

        It has ids, labels and which labels are pending; no keys and values, and no deadlines. The first snapshot of an
        engine reads the checkpoint's files once for their digest, a second for each GB or less
        (`Engine.weights_digest`).

        Returns:
            A dict for `json.dumps`: a few bytes a token.

        Raises:
            InvalidText: Text is held back, which a snapshot does not carry.
            CheckpointError: The checkpoint's files have changed since they were loaded.
            StreamClosed: The stream or the engine is closed.
        """
        with self._core.gate:
            return snapshot_of(self._core, self._state)

    def close(self) -> None:
        """Free the stream's KV blocks and its place in the engine. Closing twice is fine."""
        with self._core.gate:
            self._core.close_stream(self._state)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def snapshot_of(core: EngineCore, state: StreamState) -> dict[str, Any]:
    """What `Stream.snapshot` returns. With the engine's gate held."""
    core.check_open(state)
    if held := held_text(state):
        raise InvalidText(
            f"{len(held)} characters of the reply are held back, and a snapshot holds ids only; call finish_text() "
            "first, or take it when held_text is empty"
        )
    return take_snapshot(state, core.fingerprint, core.undelivered.num_of(state))
