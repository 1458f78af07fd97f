"""Reward functions for verl. Does not need verl itself.

verl loads a function from a file and calls it for each solution, or for a batch of them (its "batch" reward manager):

    custom_reward_function.path=<this file>
    custom_reward_function.name=compute_score          # or compute_score_async, or compute_scores for batches
    +custom_reward_function.reward_kwargs.checkpoint=<folder or hub id>

Each process loads the engine once. verl does not pass the prompt to reward functions, so the data set must have it in
extra_info. For a preference model, or an engine of your own, write a file with

    scores = GuardScores(AsyncEngine.from_pretrained(...), "hybrid", preference=...)
    compute_score = scores.compute_score
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from guardengine.engine.async_engine import AsyncEngine
from guardengine.engine.moderator import AsyncModerator
from guardengine.errors import ConfigError
from guardengine.rewards import AsyncGuardReward, Equation, Reward

T = TypeVar("T")
Score = dict[str, float]


class GuardScores:
    """verl's reward functions on an AsyncEngine, which runs in an event loop of this object.

    The functions may be called from any threads and event loops. Calls at the same time share the engine's steps.
    """

    def __init__(
        self,
        engine: AsyncModerator,
        equation: Equation = "guard-only",
        *,
        prompt_key: str = "prompt",
        preference_key: str | None = None,
        **options: Any,
    ) -> None:
        """Start the event loop.

        Args:
            engine: The engine. It must not have been used in another event loop.
            equation: "guard-only" or "hybrid", see `guardengine.rewards`.
            prompt_key: The key of extra_info with the prompt, as text or messages.
            preference_key: For hybrid, the key of extra_info with the preference score, instead of a `preference`
                function.
            **options: Further options of `guardengine.rewards.GuardReward`.

        Raises:
            ConfigError: An option is not valid.
        """
        self._reward = AsyncGuardReward(engine, equation, **options)
        self._prompt_key, self._preference_key = prompt_key, preference_key
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="guardengine-rewards", daemon=True
        )
        self._thread.start()

    def compute_score(
        self,
        data_source: str,
        solution_str: str,
        ground_truth: Any,
        extra_info: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> Score:
        """The score of one completion. Waits for it.

        Args:
            data_source: Not used.
            solution_str: The completion.
            ground_truth: Not used.
            extra_info: Must have the prompt, and for `preference_key` the preference score.

        Returns:
            {"score", "guard_safe", "guard_refusal"}. The last two are 0.0 or 1.0; guard_refusal is 0.0 where it is not
                known.

        Raises:
            ConfigError: extra_info lacks the prompt or the score.
            GuardEngineError: The errors of GuardReward.
        """
        return self._submit([solution_str], [extra_info]).result()[0]

    async def compute_score_async(
        self,
        data_source: str,
        solution_str: str,
        ground_truth: Any,
        extra_info: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> Score:
        """The score of one completion, without blocking the caller's event loop.

        Args:
            data_source: Not used.
            solution_str: The completion.
            ground_truth: Not used.
            extra_info: Must have the prompt, and for `preference_key` the preference score.

        Returns:
            {"score", "guard_safe", "guard_refusal"}. The last two are 0.0 or 1.0; guard_refusal is 0.0 where it is not
                known.

        Raises:
            ConfigError: extra_info lacks the prompt or the score.
            GuardEngineError: The errors of GuardReward.
        """
        return (await asyncio.wrap_future(self._submit([solution_str], [extra_info])))[0]

    def compute_scores(
        self,
        data_sources: Sequence[str],
        solution_strs: Sequence[str],
        ground_truths: Sequence[Any],
        extra_infos: Sequence[Mapping[str, Any] | None],
        **_: Any,
    ) -> list[Score]:
        """The scores of a batch of completions, judged in one call of the engine.

        Args:
            data_sources: Not used.
            solution_strs: The completions.
            ground_truths: Not used.
            extra_infos: One mapping for each completion, with the prompt, and for `preference_key` the preference
                score.

        Returns:
            One score for each completion, in order; see `GuardScores.compute_score`.

        Raises:
            ConfigError: An extra_info lacks the prompt or the score.
            GuardEngineError: The errors of GuardReward.
        """
        return self._submit(list(solution_strs), list(extra_infos)).result()

    def close(self) -> None:
        """Stop the event loop. The engine stays open."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _submit(self, solutions: list[str], infos: list[Mapping[str, Any] | None]) -> Future[list[Score]]:
        return self._in_loop(self._scores(solutions, infos))

    def _in_loop(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    async def _scores(self, solutions: list[str], infos: list[Mapping[str, Any] | None]) -> list[Score]:
        if len(infos) != len(solutions):
            raise ConfigError(f"{len(solutions)} solutions and {len(infos)} extra_infos: give one of each")
        prompts = [_plain(_from(info, self._prompt_key, "prompt_key")) for info in infos]
        preferences = None
        if self._preference_key is not None:
            preferences = [_from(info, self._preference_key, "preference_key") for info in infos]
        return [_score(reward) for reward in await self._reward(prompts, solutions, preferences)]


_made: dict[str, GuardScores] = {}
_making = threading.Lock()


def compute_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: Any = None, **kwargs: Any
) -> Score:
    """The score of one completion, from the engine of this process.

    Args:
        data_source: Not used.
        solution_str: The completion.
        ground_truth: Not used.
        extra_info: Must have the prompt, and for `preference_key` the preference score.
        **kwargs: checkpoint, revision, equation, prompt_key, preference_key, on_unjudged and engine_options, from
            verl's reward_kwargs; others are ignored. on_unjudged is "unsafe" by default, so that a completion that is
            too long for the guard does not end a training run.

    Returns:
        {"score", "guard_safe", "guard_refusal"}. The last two are 0.0 or 1.0; guard_refusal is 0.0 where it is not
            known.

    Raises:
        ConfigError: extra_info lacks the prompt or the score.
        GuardEngineError: The errors of GuardReward.
    """
    return _process_scores(**kwargs).compute_score(data_source, solution_str, ground_truth, extra_info)


async def compute_score_async(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: Any = None, **kwargs: Any
) -> Score:
    """The score of one completion, from the engine of this process, without blocking the caller's event loop.

    Args:
        data_source: Not used.
        solution_str: The completion.
        ground_truth: Not used.
        extra_info: Must have the prompt, and for `preference_key` the preference score.
        **kwargs: checkpoint, revision, equation, prompt_key, preference_key, on_unjudged and engine_options, from
            verl's reward_kwargs; others are ignored. on_unjudged is "unsafe" by default, so that a completion that is
            too long for the guard does not end a training run.

    Returns:
        {"score", "guard_safe", "guard_refusal"}. The last two are 0.0 or 1.0; guard_refusal is 0.0 where it is not
            known.

    Raises:
        ConfigError: extra_info lacks the prompt or the score.
        GuardEngineError: The errors of GuardReward.
    """
    scores = _process_scores(**kwargs)
    return await scores.compute_score_async(data_source, solution_str, ground_truth, extra_info)


def compute_scores(
    data_sources: Sequence[str],
    solution_strs: Sequence[str],
    ground_truths: Sequence[Any],
    extra_infos: Sequence[Any],
    **kwargs: Any,
) -> list[Score]:
    """The scores of a batch of completions, from the engine of this process.

    Args:
        data_sources: Not used.
        solution_strs: The completions.
        ground_truths: Not used.
        extra_infos: One mapping for each completion, with the prompt, and for `preference_key` the preference score.
        **kwargs: checkpoint, revision, equation, prompt_key, preference_key, on_unjudged and engine_options, from
            verl's reward_kwargs; others are ignored. on_unjudged is "unsafe" by default, so that a completion that is
            too long for the guard does not end a training run.

    Returns:
        One score for each completion, in order; see `compute_score`.

    Raises:
        ConfigError: An extra_info lacks the prompt or the score.
        GuardEngineError: The errors of GuardReward.
    """
    return _process_scores(**kwargs).compute_scores(data_sources, solution_strs, ground_truths, extra_infos)


def _process_scores(
    *,
    checkpoint: str | None = None,
    revision: str | None = None,
    equation: Equation = "guard-only",
    prompt_key: str = "prompt",
    preference_key: str | None = None,
    on_unjudged: Any = "unsafe",
    engine_options: Mapping[str, Any] | None = None,
    **_: Any,
) -> GuardScores:
    """The reward functions of this process for a checkpoint and options. They are made once, and so is the engine."""
    if checkpoint is None:
        raise ConfigError(
            "reward_kwargs.checkpoint is missing: give the folder or hub id of a Qwen3Guard checkpoint "
            "(+custom_reward_function.reward_kwargs.checkpoint=...)"
        )
    options = dict(engine_options or {})
    key = repr(
        (checkpoint, revision, equation, prompt_key, preference_key, on_unjudged, sorted(options.items()))
    )
    with _making:
        if key not in _made:
            engine = AsyncEngine.from_pretrained(checkpoint, revision=revision, **options)
            _made[key] = GuardScores(
                engine,
                equation,
                prompt_key=prompt_key,
                preference_key=preference_key,
                on_unjudged=on_unjudged,
            )
        return _made[key]


def _from(info: Any, key: str, option: str) -> Any:
    if not isinstance(info, Mapping) or key not in info:
        has = (
            f"it has {', '.join(map(str, info)) or 'nothing'}"
            if isinstance(info, Mapping)
            else f"it is {info!r}"
        )
        raise ConfigError(
            f"extra_info has no {key!r} ({has}); add it to the data set's extra_info, or set {option} to its name"
        )
    return info[key]


def _plain(prompt: Any) -> Any:
    """A prompt as a list: rows of Parquet files have arrays."""
    return prompt.tolist() if hasattr(prompt, "tolist") else prompt


def _score(reward: Reward) -> Score:
    is_safe = reward.output == "Safe" and reward.thinking in (None, "Safe")
    return {
        "score": reward.value,
        "guard_safe": float(is_safe),
        "guard_refusal": float(bool(reward.is_refusal)),
    }
