"""transformers' generate(): stops rows whose reply is blocked, and streams only what is cleared.

    criteria = GuardStoppingCriteria(
        engine, [stream], num_prompt_tokens=inputs.input_ids.shape[1], eos_token_id=llm.generation_config.eos_token_id
    )
    llm.generate(**inputs, stopping_criteria=[criteria], streamer=GuardedStreamer(criteria, TextStreamer(tokenizer)))

Everything runs in the thread of generate, which has to be the engine's. Whether generate calls the criteria or the
streamer first for a token (releases differ) does not matter: who comes first feeds it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from guardengine import checks
from guardengine.engine.engine import Engine
from guardengine.engine.stream import Stream
from guardengine.errors import ConfigError
from guardengine.guarding.deltas import Shape
from guardengine.guarding.feeding import SyncReply
from guardengine.labels import Verdict


class GuardStoppingCriteria(StoppingCriteria):
    """Feeds each row's new tokens to its stream, all rows in one step, and stops the rows that are blocked.

    Beam search moves tokens between rows, which is noticed and refused with ConfigError. So is another number of rows
    than streams, and a second generate.

    Args:
        engine: is run in generate's thread, which has to be the engine's.
        streams: one for each row of one call of generate, opened from the row's prompt. A row whose prompt is blocked
            stops at its first token; run the engine and look at the verdict before generate to save that.
        num_prompt_tokens: how many tokens of input_ids are not the reply's: the padded prompt's length; 1, as a rule,
            with an encoder and a decoder; 0 with inputs_embeds.
        eos_token_id: what ends a row, as generate has it. Needed for more than one row, because generate goes on
            padding rows that have ended. It is not fed: `finish` feeds the reply's <|im_end|>.
        tokenizer: the LLM's, where it is not Qwen3's; replies are fed as text then.

    Raises:
        ConfigError: for streams, numbers or ids that do not go together.
    """

    def __init__(
        self,
        engine: Engine,
        streams: Sequence[Stream],
        *,
        num_prompt_tokens: int,
        eos_token_id: int | Iterable[int] | None = None,
        tokenizer: Any = None,
    ) -> None:
        self._engine = engine
        if not streams or not all(isinstance(stream, Stream) for stream in streams):
            raise ConfigError("streams: a list of streams of an Engine is needed, one for each row")
        if len({id(stream) for stream in streams}) < len(streams):
            raise ConfigError("streams: a stream is named twice; each row needs one of its own")
        checks.whole_number("num_prompt_tokens", num_prompt_tokens, 0)
        if eos_token_id is None and len(streams) > 1:
            raise ConfigError(
                "eos_token_id is needed for more than one row: generate pads rows that have ended, and padding is no "
                "part of a reply; pass the LLM's generation_config.eos_token_id"
            )
        eos = (
            [eos_token_id]
            if isinstance(eos_token_id, int)
            else []
            if eos_token_id is None
            else list(eos_token_id)
        )
        shape = Shape(tokenizer=tokenizer)
        self._rows = [_Row(stream, shape, frozenset(int(x) for x in eos)) for stream in streams]
        self._num_prompt_tokens = num_prompt_tokens
        self._seen: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Judge each row's new tokens.

        Args:
            input_ids: int64 [rows, tokens], all tokens so far.
            scores: not looked at.
            kwargs: not looked at.

        Returns:
            bool [rows], True for rows that are to stop.

        Raises:
            ConfigError: rows were moved, or are not those of the streams.
            GuardEngineError: what `Stream.append` and `Engine.run` raise.
        """
        self._check_rows(input_ids)
        for row, ids in zip(self._rows, input_ids[:, self._num_prompt_tokens :].tolist(), strict=True):
            row.feed(ids)
        self._engine.run()
        stops = [row.is_blocked for row in self._rows]
        return torch.tensor(stops, dtype=torch.bool, device=input_ids.device)

    def finish(self) -> list[Verdict]:
        """Finish the replies after generate: feed what is held back and their <|im_end|>. A GuardedStreamer does it at
        its end.

        Returns:
            A verdict a row, on all of its reply.
        """
        for row in self._rows:
            row.finish()
        self._engine.run()
        return [row.stream.verdict for row in self._rows]

    def _check_rows(self, input_ids: torch.Tensor) -> None:
        num_rows, num_tokens = input_ids.shape
        if num_rows != len(self._rows):
            raise ConfigError(
                f"generate has {num_rows} rows for {len(self._rows)} streams; pass a stream for each row (prompts "
                "times num_return_sequences), and no beam search"
            )
        seen, self._seen = self._seen, input_ids
        if num_tokens < self._num_prompt_tokens:
            raise ConfigError(
                f"input_ids has {num_tokens} tokens, num_prompt_tokens={self._num_prompt_tokens}; pass "
                "inputs.input_ids.shape[1] of this call of generate"
            )
        if seen is not None and not (
            num_tokens >= seen.shape[1] and torch.equal(input_ids[:, : seen.shape[1]], seen)
        ):
            raise ConfigError(
                "the rows do not continue those of the step before: beam search moves tokens between rows (use "
                "num_beams=1), and each call of generate needs criteria and streams of its own"
            )


class GuardedStreamer(BaseStreamer):
    """A streamer for generate that hands on what is cleared, held back by the stream's policy.

    At the end the reply is finished, and the rest handed on unless that is blocked.

    Args:
        criteria: the GuardStoppingCriteria of the same generate, with one row; without it among generate's
            stopping_criteria text is held back just as well, but nothing stops.
        inner: a streamer (TextStreamer, TextIteratorStreamer, ...), which also gets the prompt, or a function that is
            called with lists of new ids.

    Raises:
        ConfigError: the criteria have several rows, or `inner` is neither.
    """

    def __init__(
        self, criteria: GuardStoppingCriteria, inner: BaseStreamer | Callable[[list[int]], Any]
    ) -> None:
        if len(criteria._rows) != 1:
            raise ConfigError(f"a streamer is for one row, and the criteria have {len(criteria._rows)}")
        if not callable(inner) and not (hasattr(inner, "put") and hasattr(inner, "end")):
            raise ConfigError(f"inner is {type(inner).__name__}; a streamer or a function is needed")
        self._criteria, self._inner = criteria, inner
        self._row = criteria._rows[0]
        self._ids: list[int] | None = None  # of the reply; None: the prompt is to come

    def put(self, value: torch.Tensor) -> None:
        """The prompt, [1, tokens], then the next tokens, [tokens] or [1, tokens]."""
        if self._ids is None:
            self._ids = []
            if hasattr(self._inner, "put"):
                self._inner.put(value)
            return
        self._ids += value.reshape(-1).tolist()
        self._row.feed(self._ids)
        self._criteria._engine.run()
        self._hand_on(self._row.take())

    def end(self) -> None:
        """Generation is over."""
        (verdict,) = self._criteria.finish()
        self._hand_on(self._row.take() if verdict.action == "block" else self._row.rest())
        if hasattr(self._inner, "end"):
            self._inner.end()

    def _hand_on(self, ids: list[int]) -> None:
        if not ids:
            return
        if hasattr(self._inner, "put"):
            self._inner.put(torch.tensor(ids))
        else:
            self._inner(ids)


class _Row:
    """A row of generate and the stream that guards it."""

    def __init__(self, stream: Stream, shape: Shape, eos: frozenset[int]) -> None:
        self.stream, self._eos = stream, eos
        # The engine is run for all rows at once.
        self._reply = SyncReply(stream, shape, run=lambda: None)
        self._num_fed = 0  # of the row's new tokens
        self._ending: list[int] = []  # the token that ended it
        self._is_finished = False

    @property
    def is_blocked(self) -> bool:
        return self._reply.is_blocked

    def feed(self, ids: list[int]) -> None:
        """Append what of the row's new tokens, all of them so far, was not appended yet. What comes after its end, or
        after a block, is padding."""
        new, self._num_fed = ids[self._num_fed :], max(self._num_fed, len(ids))
        if self._ending or self._is_finished or self.is_blocked:
            return
        for index, token_id in enumerate(new):
            if token_id in self._eos:
                new, self._ending = new[:index], [token_id]
                break
        self._reply.append([new])

    def finish(self) -> None:
        """Append the rest of the reply and its end."""
        if self._is_finished or self.is_blocked:
            return
        self._is_finished = True
        self._reply.finish()

    def take(self) -> list[int]:
        """Ids of the reply that are cleared by now, and were not taken."""
        return [token_id for ids in self._reply.take() for token_id in ids]

    def rest(self) -> list[int]:
        """All that were not taken, with the one that ended the row."""
        ending, self._ending = self._ending, []
        return [*(token_id for ids in self._reply.rest() for token_id in ids), *ending]
