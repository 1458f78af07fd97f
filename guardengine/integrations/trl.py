"""Reward functions for TRL's trainers (`reward_funcs` of GRPOTrainer, RLOOTrainer and others). Does not need trl
itself.

TRL calls a reward function with keywords: prompts, completions, completion_ids, the other columns of the data set,
trainer_state, log_extra, log_metric and sometimes environments. Completions are strings or lists of messages. It
expects a list of floats, and names the reward after the __name__ of the function.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from guardengine.engine.moderator import AsyncModerator, Moderator
from guardengine.errors import ConfigError
from guardengine.rewards import AsyncGuardReward, Equation, GuardReward, Reward, Text

RewardFunction = Callable[..., list[float | None]]
AsyncRewardFunction = Callable[..., Awaitable[list[float | None]]]


def guard_reward(
    engine: Moderator,
    equation: Equation = "guard-only",
    *,
    preference_column: str | None = None,
    name: str | None = None,
    **options: Any,
) -> RewardFunction:
    """A reward function that judges with an Engine.

    It writes the safety of thinking and output to TRL's table of completions, and the shares of unsafe completions and
    of refusals as metrics.

    Args:
        engine: The engine. It belongs to the thread that uses it first, so let only the trainer use it.
        equation: "guard-only" or "hybrid", see `guardengine.rewards`.
        preference_column: For hybrid, the column of the data set with the preference scores, instead of a `preference`
            function.
        name: The name of the reward in TRL's logs; by default "guard_only_reward" or "hybrid_reward".
        **options: Further options of `guardengine.rewards.GuardReward`.

    Returns:
        A function to put into `reward_funcs`. It raises the errors of GuardReward.

    Raises:
        ConfigError: An option is not valid.
    """
    reward = GuardReward(engine, equation, **options)

    def function(prompts: Sequence[Text], completions: Sequence[Text], **given: Any) -> list[float | None]:
        found = reward(prompts, completions, _preferences(given, preference_column))
        return _reported(found, function.__name__, given)

    _name(function, equation, name)
    return function


def async_guard_reward(
    engine: AsyncModerator,
    equation: Equation = "guard-only",
    *,
    preference_column: str | None = None,
    name: str | None = None,
    **options: Any,
) -> AsyncRewardFunction:
    """An async reward function that judges with an AsyncEngine. TRL runs it beside its other async rewards, in an
    event loop of TRL's own.

    It writes the safety of thinking and output to TRL's table of completions, and the shares of unsafe completions and
    of refusals as metrics.

    Args:
        engine: The engine. It must not have been used in another event loop.
        equation: "guard-only" or "hybrid", see `guardengine.rewards`.
        preference_column: For hybrid, the column of the data set with the preference scores, instead of a `preference`
            function.
        name: The name of the reward in TRL's logs; by default "guard_only_reward" or "hybrid_reward".
        **options: Further options of `guardengine.rewards.GuardReward`.

    Returns:
        A function to put into `reward_funcs`. It raises the errors of GuardReward.

    Raises:
        ConfigError: An option is not valid.
    """
    reward = AsyncGuardReward(engine, equation, **options)

    async def function(
        prompts: Sequence[Text], completions: Sequence[Text], **given: Any
    ) -> list[float | None]:
        found = await reward(prompts, completions, _preferences(given, preference_column))
        return _reported(found, function.__name__, given)

    _name(function, equation, name)
    return function


def _name(function: Any, equation: Equation, name: str | None) -> None:
    function.__name__ = name or f"{equation.replace('-', '_')}_reward"
    function.__qualname__ = function.__name__


def _preferences(given: dict[str, Any], column: str | None) -> Sequence[float] | None:
    if column is None:
        return None
    if column not in given:
        raise ConfigError(
            f"preference_column={column!r}: the data set has no such column; it has "
            f"{', '.join(sorted(given)) or 'none'}"
        )
    scores: Sequence[float] = given[column]
    return scores


def _reported(rewards: list[Reward], name: str, given: dict[str, Any]) -> list[float | None]:
    """The values of the rewards, after they were written to TRL's logs. The names in the logs begin with the reward's
    name, because a trainer may have several."""
    if callable(log_extra := given.get("log_extra")):
        log_extra(f"{name}/thinking", [each.thinking or "-" for each in rewards])
        log_extra(f"{name}/output", [each.output for each in rewards])
    if callable(log_metric := given.get("log_metric")) and rewards:
        unsafe = sum(each.output != "Safe" or each.thinking not in (None, "Safe") for each in rewards)
        log_metric(f"{name}/unsafe", unsafe / len(rewards))
        refusals = [each.is_refusal for each in rewards if each.is_refusal is not None]
        if refusals:
            log_metric(f"{name}/refusal", sum(refusals) / len(refusals))
    return [each.value for each in rewards]
