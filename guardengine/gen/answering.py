"""Answering: Gen conversations under way on an engine's core, from the first to the last token of their answers.

Each is a stream of the core like any other, so that prompts and answers of all share steps, blocks and limits. After a
step `advance` multiplies the rows that were wanted with the language model's head, all streams' at once, and feeds
what follows. What all prompts of a kind begin with is computed once, before the first of several that come together;
the prefix cache has it from then on. Single-threaded, as the core is.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from guardengine.core.admission import Ticket
from guardengine.core.engine_core import EngineCore
from guardengine.core.feeds import Feed
from guardengine.core.state import StreamState, Wanted
from guardengine.errors import CheckpointError, Overloaded
from guardengine.gen.answers import Answer, ChosenAnswer, Floats, GreedyAnswer, Mode, Move
from guardengine.gen.grammar import Grammar
from guardengine.gen.prompts import Prompt
from guardengine.labels import Role
from guardengine.policy import Policy

_ROWS_AT_ONCE = 32  # of a whole vocabulary's logits
_NO_POLICY = Policy.strict()  # answers are judged when they are complete


@dataclass(slots=True, eq=False)
class Job:
    """A conversation to be answered. `done` is called once, when `answer` is complete or will not be."""

    prompt: Prompt
    mode: Mode
    answer: Answer
    done: Callable[[Job], None]
    state: StreamState | None = None  # while it is being answered
    move: Move | None = None  # to be fed when there is room
    has_failed: bool = False  # the model has, on this stream
    error: Overloaded | None = None  # there is no room, and none will be
    began: float = field(default_factory=time.monotonic)

    @property
    def num_room(self) -> int:
        """Tokens that its stream may come to."""
        return len(self.prompt.token_ids) + self.answer.most_tokens


class Answering:
    """The conversations that wait for an answer, and those that are being given one."""

    def __init__(
        self,
        core: EngineCore,
        grammars: Mapping[Role, Grammar],
        stop_ids: frozenset[int],
        prefixes: Mapping[Role, list[int]],
    ) -> None:
        """stop_ids: what ends a greedy answer. prefixes: what all prompts of a role begin with."""
        if core.runner.lm_head is None:
            raise CheckpointError(
                "the checkpoint has no language model head; use a Qwen3Guard-Gen checkpoint"
            )
        self._core, self._grammars, self._stop_ids, self._prefixes = core, grammars, stop_ids, prefixes
        self._lm_head = core.runner.lm_head
        self._head_rows = {
            role: self._lm_head.rows_of(grammar.token_ids) for role, grammar in grammars.items()
        }
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._warming: dict[Role, StreamState] = {}  # prefixes that are being computed

    @property
    def states(self) -> list[StreamState]:
        """The streams of all that is under way."""
        return [_state(job) for job in self._running] + list(self._warming.values())

    def check_waiting(self, num_more: int, most: int) -> None:
        """Raise Overloaded where so many more would make more than `most` wait."""
        if len(self._waiting) + num_more > most and self._waiting:
            raise Overloaded(
                f"{len(self._waiting)} conversations wait for an answer and {num_more} more would pass "
                f"max_waiting={most}; retry when some are done"
            )

    def check_length(self, prompt: Prompt, mode: Mode) -> None:
        """Raise StreamTooLong where a conversation and its answer could never be computed."""
        most_tokens = self._answer(prompt.role, mode).most_tokens
        self._core.check_length(len(prompt.token_ids) + most_tokens, is_new=True)

    def submit(self, prompts: Sequence[Prompt], mode: Mode, done: Callable[[Job], None]) -> list[Job]:
        """Let conversations wait for their answers: the next `advance` opens them. Raises StreamTooLong, and then none
        waits."""
        for prompt in prompts:
            self.check_length(prompt, mode)
        jobs = [Job(prompt, mode, self._answer(prompt.role, mode), done) for prompt in prompts]
        roles = [prompt.role for prompt in prompts]
        for role in self._prefixes:
            if roles.count(role) > 1:
                self._warm(role)
        self._waiting += jobs
        return jobs

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Drop those of these that are not done."""
        for job in jobs:
            if job in self._running:
                self._stop(job)
            elif job in self._waiting:
                self._waiting.remove(job)
        if not self._running and not self._waiting:
            while self._warming:
                self._core.close_stream(self._warming.popitem()[1])

    def fail(self, states: Sequence[StreamState]) -> None:
        """The model has failed on these streams: their tokens will not be computed."""
        for job in [job for job in self._running if job.state in states]:
            job.has_failed = True
            self._end(job)
        for role in [role for role, state in self._warming.items() if state in states]:
            self._core.close_stream(self._warming.pop(role))

    def advance(self) -> None:
        """Read what the last steps have computed, feed what follows, and open what waits as far as there is room."""
        for role in [role for role, state in self._warming.items() if not state.num_pending_tokens]:
            self._core.close_stream(self._warming.pop(role))
        for job in [job for job in self._running if _state(job).is_closed]:
            self._begin_again(job)  # it waited for room for longer than idle_ttl_s
        ready = [job for job in self._running if job.move is None and not _state(job).num_pending_tokens]
        for job, logits in self._read(ready):
            job.move = job.answer.advance(logits)
            if job.move is None:
                self._end(job)
        stalled = [job for job in self._running if job.move is not None and not self._feed(job)]
        self._open()
        if stalled and not self._core.has_work:
            self._make_way(stalled)

    # -- internals -----------------------------------------------------------------------------------------

    def _answer(self, role: Role, mode: Mode) -> Answer:
        grammar = self._grammars[role]
        return ChosenAnswer(grammar) if mode == "choice" else GreedyAnswer(grammar, self._stop_ids)

    def _warm(self, role: Role) -> None:
        """Compute what the prompts of a role begin with, where the prefix cache does not have it."""
        block_size = self._core.pool.block_size
        prefix = self._prefixes[role][
            : len(self._prefixes[role]) // block_size * block_size
        ]  # what is shared
        if self._core.pool.cache is None or role in self._warming or not prefix:
            return
        with contextlib.suppress(Overloaded):  # then each computes its own
            self._warming[role] = self._core.open(Feed(prefix, [], None), Ticket(_NO_POLICY))

    def _read(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, Floats]]:
        """What the head makes of the rows that these wanted."""
        greedy = [job for job in jobs if job.mode == "greedy"]
        for start in range(0, len(greedy), _ROWS_AT_ONCE):
            part = greedy[start : start + _ROWS_AT_ONCE]
            logits = self._lm_head.logits(np.concatenate([_pop_rows(job) for job in part]))
            yield from zip(part, np.split(logits, len(part)), strict=True)
        for job in jobs:
            if job.mode == "choice":
                yield job, _pop_rows(job) @ self._head_rows[job.prompt.role].T

    def _feed(self, job: Job) -> bool:
        """Feed a job's next tokens; False where there is no room for them now."""
        core, state, move = self._core, _state(job), job.move
        if move is None:
            return True
        start = len(job.prompt.token_ids)
        if surplus := state.num_tokens - start - move.num_kept:
            core.rollback(state, surplus)
        try:
            core.accept(state, _feed(start, list(move.token_ids), move))
        except Overloaded:
            return False
        job.move = None
        return True

    def _open(self) -> None:
        later: deque[Job] = deque()
        while self._waiting:
            job = self._waiting.popleft()
            if job.prompt.role in self._warming:
                later.append(job)
                continue
            move = job.answer.start()
            token_ids = job.prompt.token_ids + list(move.token_ids)
            try:
                if self._running:
                    self._check_room(job)
                job.state = self._core.open(
                    _feed(len(job.prompt.token_ids), token_ids, move), Ticket(_NO_POLICY)
                )
            except Overloaded as error:
                job.answer = self._answer(job.prompt.role, job.mode)
                if self._running or self._warming:
                    later.append(job)
                    break
                job.error = error
                job.done(job)
            else:
                self._running.append(job)
        self._waiting = later + self._waiting

    def _check_room(self, job: Job) -> None:
        """Raise Overloaded where what is under way may come to need the room that a new stream would take."""
        growth = sum(other.num_room - _state(other).num_tokens for other in self._running)
        if not self._core.residency.has_room(job.num_room + growth):
            raise Overloaded("answers that are under way may need what is left of the KV cache")

    def _make_way(self, stalled: Sequence[Job]) -> None:
        """None can go on for want of the others' blocks: the newest begins again when there is room."""
        self._begin_again(stalled[-1])
        for other in stalled[:-1]:
            self._feed(other)
        if not self._running:
            self._open()

    def _begin_again(self, job: Job) -> None:
        self._stop(job)
        job.answer = self._answer(job.prompt.role, job.mode)
        self._waiting.appendleft(job)

    def _end(self, job: Job) -> None:
        self._stop(job)
        job.done(job)

    def _stop(self, job: Job) -> None:
        self._core.close_stream(_state(job))
        self._running.remove(job)
        job.state = job.move = None


def run_prompts(core: EngineCore, answering: Answering, prompts: Sequence[Prompt], mode: Mode) -> list[Job]:
    """Answer conversations; returns their jobs, done, in order. Other streams advance too.

    Raises StreamTooLong before anything runs, Overloaded where not even one fits, and what the model raises.
    """
    num_done = 0

    def done(_: Job) -> None:
        nonlocal num_done
        num_done += 1

    jobs = answering.submit(prompts, mode, done)
    try:
        answering.advance()
        while num_done < len(jobs):
            core.step_for(answering.states)
            answering.advance()
    finally:
        answering.cancel(jobs)
    for job in jobs:
        if job.error is not None:
            raise job.error
    return jobs


def _feed(start: int, token_ids: list[int], move: Move) -> Feed:
    """`start` is where the answer begins."""
    return Feed(token_ids, [Wanted(start + read, "answer") for read in move.reads], None)


def _pop_rows(job: Job) -> Floats:
    """The rows that a stream's last tokens came to, once.  -> [reads, E]"""
    state = _state(job)
    rows = np.stack([hidden.row for hidden in state.hidden])
    state.hidden.clear()
    return rows


def _state(job: Job) -> StreamState:
    if job.state is None:
        raise CheckpointError("a conversation is not under way")
    return job.state
