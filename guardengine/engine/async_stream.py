"""AsyncStream: the handle that asyncio code holds on one conversation."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Sequence
from typing import Any

from guardengine.core.admission import check_timeout
from guardengine.core.feeds import check_role
from guardengine.core.state import StreamState
from guardengine.core.text_feeding import check_length, is_long
from guardengine.engine.calls import Append, Future, Measured
from guardengine.engine.engine_thread import EngineThread
from guardengine.engine.stream import StreamView, snapshot_of
from guardengine.errors import GuardEngineError, StreamTooLong
from guardengine.labels import Label, Role, Verdict
from guardengine.text.spans import Piece


class AsyncStream(StreamView):
    """A handle on one conversation in an AsyncEngine. Made by `AsyncEngine.open` and `AsyncStream.fork`.

    Also an async context manager that closes it; one that nobody holds any more is closed by itself. Calls on one
    stream take effect in the order in which they were made. Properties may be read from any thread, and after close.
    """

    def __init__(
        self,
        owner: object,
        thread: EngineThread,
        state: StreamState,
        turn: Future,
        unrecorded: list[Append],
    ) -> None:
        super().__init__(state)
        self._owner = owner  # which closes the engine when nobody holds it
        self._thread, self._calls = thread, thread.calls
        self._turn = turn  # done when what fed the latest user turn is
        self._unrecorded = unrecorded
        weakref.finalize(self, self._calls.abandon, state).atexit = False

    async def append(
        self, token_ids: Sequence[int], role: Role = "assistant", *, timeout_s: float | None = None
    ) -> list[Label]:
        """Feed more tokens and return their labels: of role "assistant" one for each, of "user" one for the turn.

        Several appends of one stream may be awaited at once. While the engine has no room for the tokens (KV blocks,
        pending tokens) this waits for it, in order of arrival within a tenant. Cancelled while it waits, it takes the
        tokens back; those that were accepted are computed, and their labels come into `labels`.

        Fewer labels than tokens are returned when
        - `timeout_s` has passed. Tokens that still wait for room then are dropped ("overload"); others are
          computed all the same ("timeout") and their late labels come into `labels`;
        - the model fails on these tokens ("error"). They are tried again with the next append;
        - a rollback drops them.
        But for the last case `verdict` says so, and `stats()["failures"]` counts it.

        Args:
            token_ids: As in `Stream.append`.
            role: "assistant", or "user" for a further user turn.
            timeout_s: Seconds from this call; None: no limit.

        Returns:
            The labels of these tokens, in order.

        Raises:
            InvalidTokens, StreamTooLong, StreamClosed, ConfigError: As in `Stream.append`; the stream is unchanged.
            Overloaded: Only where `max_waiting` appends wait to be accepted already.
        """
        ids = self._thread.core.check_token_ids(token_ids)
        check_role(role)
        return await self._append(timeout_s, ids, role)

    async def append_text(
        self,
        delta: str | bytes | bytearray | memoryview,
        *,
        is_final: bool = False,
        timeout_s: float | None = None,
    ) -> list[Label]:
        """Feed more of the reply as text, and return the labels of the tokens that this fed: [] at once when all of it
        is held back. See `Stream.append_text`.

        Text is never lost: cancelled, or out of time while there is no room, it stays in the reply, held back, and is
        fed with what comes next. `is_final` has not happened then: call `finish_text`. For the rest this waits, fails
        and is cancelled as `append`. Text is tokenized in the engine's thread; whether a long text can fit is checked
        beside it first, while other streams go on.

        Args:
            delta: The next piece, of any size. Bytes are UTF-8.
            is_final: Whether the reply ends here, as if `finish_text` followed.
            timeout_s: Seconds from this call; None: no limit.

        Returns:
            The labels of the tokens that were fed, in order.

        Raises:
            InvalidText, ConfigError, StreamClosed: As in `Stream.append_text`.
            StreamTooLong: Also when what is held back is too much to be fed at once; `rollback(0)` drops it.
            Overloaded: As in `append`.
        """
        text = bytes(delta) if isinstance(delta, bytearray | memoryview) else delta  # read later: a copy
        return await self._append(timeout_s, piece=Piece(text, is_final=is_final, ends_turn=is_final))

    async def append_foreign_ids(
        self, token_ids: Sequence[int], tokenizer: Any, *, timeout_s: float | None = None
    ) -> list[Label]:
        """Feed more of the reply as ids of another tokenizer. See `Stream.append_foreign_ids` and `append_text`.

        Its decode is called in the engine's thread, for which transformers' fast tokenizers are safe unless another
        thread encodes with padding or truncation at the same time: give this one of its own then.

        Args:
            token_ids: Ids of `tokenizer`.
            tokenizer: The LLM's, anything with decode(ids) -> str.
            timeout_s: Seconds from this call; None: no limit.
        """
        return await self._append(timeout_s, piece=Piece.of_foreign(token_ids, tokenizer))

    async def finish_text(self, *, end_turn: bool = True, timeout_s: float | None = None) -> list[Label]:
        """Feed what is held back and the reply's <|im_end|>, and return their labels. What is cancelled or out of time
        while it waits for room has not happened. See `Stream.finish_text`.

        Args:
            end_turn: Whether to feed the <|im_end|>; without it the reply stays open.
            timeout_s: Seconds from this call; None: no limit.
        """
        return await self._append(timeout_s, piece=Piece(is_final=True, ends_turn=end_turn))

    async def _append(
        self,
        timeout_s: float | None,
        token_ids: Sequence[int] = (),
        role: Role = "assistant",
        piece: Piece | None = None,
    ) -> list[Label]:
        timeout_s = None if timeout_s is None else check_timeout(timeout_s)
        calls = self._calls
        calls.check_waiting()
        append = Append(self._state, calls.new_future(), self._unrecorded, list(token_ids), role, piece)
        if role == "user":
            self._turn = append.future
        if piece is not None and is_long(piece):
            self._measure(append, piece)
        return await calls.append(append, timeout_s)

    def _measure(self, append: Append, piece: Piece) -> None:
        """Find out beside the engine's thread whether a long text can fit; what follows on the stream waits for it."""
        chat, max_tokens = self._thread.chat, self._thread.core.max_model_len
        if chat is None:
            return

        def done(measuring: asyncio.Future[None]) -> None:
            error = None if measuring.cancelled() else measuring.exception()
            # What else is wrong with it is found, and raised, in its turn.
            append.too_long = error if isinstance(error, StreamTooLong) else None
            self._calls.send(Measured(append))

        append.is_measuring = True
        measuring = self._calls.bind().run_in_executor(None, check_length, chat, piece, max_tokens)
        measuring.add_done_callback(done)

    async def prompt(self) -> Label | None:
        """Wait until the latest user turn is read, or given up, and return its label.

        None where there is none: the turn was not computed in time or at all (see `verdict`), or the call that fed it
        was cancelled. After `open` all labels of what the stream was opened with are waited for, those of the beginning
        of a reply included. Raises StreamClosed.
        """
        self._calls.bind()
        turn = self._turn
        await asyncio.wait([turn])  # which others may be waiting for: not cancelled with this one
        if self.prompt_label is None and not turn.cancelled() and (error := turn.exception()):
            raise error
        return self.prompt_label

    async def fork(self, stream_id: str | None = None) -> AsyncStream:
        """Branch off a stream with the same tokens, labels and verdict, sharing the computed KV blocks.

        Labels that are pending will come into `labels` of both.

        Args:
            stream_id: The branch's name; by default one that is not in use.

        Raises:
            Overloaded, ConfigError, StreamClosed: As in `Stream.fork`.
        """
        parent, thread, turn = self._state, self._thread, self._calls.new_future()

        def run() -> AsyncStream:
            branch = thread.core.fork(parent, stream_id)
            thread.expect_turn(branch, turn)
            return AsyncStream(self._owner, thread, branch, turn, [])

        try:
            return await self._calls.call(run, parent, is_skippable=True)  # type: ignore[no-any-return]
        except BaseException:
            self._calls.forget(turn)
            raise

    async def rollback(self, num_tokens: int) -> None:
        """Drop the last `num_tokens` tokens with their labels. It takes place also when this is cancelled.

        Args:
            num_tokens: As in `Stream.rollback`.

        Raises:
            InvalidTokens, StreamClosed: As in `Stream.rollback`.
        """
        thread, state = self._thread, self._state
        await self._calls.call(lambda: thread.rollback(state, num_tokens), state)

    async def snapshot(self) -> dict[str, Any]:
        """The stream as a small JSON value with which `AsyncEngine.restore` or `Engine.restore` goes on: of the time
        after the appends before this call were accepted. As `Stream.snapshot`, and raises as it does."""
        self._calls.bind()
        core, state = self._thread.core, self._state
        # Beside the engine's thread, because the first one reads whole files.
        await asyncio.to_thread(core.fingerprint.weights)
        return await self._calls.call(lambda: snapshot_of(core, state), state)  # type: ignore[no-any-return]

    async def close(self) -> None:
        """Free the stream's memory. Appends that are waited for raise StreamClosed. Closing twice is fine."""
        if self._state.is_closed:
            return
        try:
            await self._calls.close_stream(self._state)
        except GuardEngineError:
            if self._calls.reason is None:  # else the engine closes its streams
                raise

    def abandon(self) -> None:
        """Close it without waiting: the engine may hang, and who is cancelled must not hang with it."""
        self._calls.abandon(self._state)

    @property
    def verdict(self) -> Verdict:
        """What the stream's policy makes of the labels so far, and of tokens that went unjudged."""
        state, policy = self._state, self._state.policy
        # Looked at before the state: what is recorded by then is in it, and to count a failure twice changes nothing.
        unrecorded = [append for append in self._unrecorded[:] if not append.is_recorded]
        policy_state = state.policy_states[-1][1]
        for append in unrecorded:
            if append.failure is not None:
                policy_state = policy.fail(policy_state, append.failure, state.num_assistant_tokens)
        return policy.verdict(policy_state)

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(self, *_: Any) -> None:
        await self.close()
