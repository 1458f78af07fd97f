"""Reward functions for TRL's trainers (`reward_funcs` of GRPOTrainer, RLOOTrainer and others). Needs no trl itself.

TRL calls a reward function with keywords: prompts, completions, completion_ids, the data set's other columns,
trainer_state, log_extra, log_metric and sometimes environments; completions are strings or lists of messages. It
expects a list of floats, and names the reward after the function's __name__.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from guardengine.engine.judging import AsyncModerator, Moderator
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
    """A reward function on an Engine, which belongs to the thread that uses it first: leave it to the trainer's.

    preference_column: the data set's column with the preference scores for hybrid, instead of a `preference` function.
    name: what TRL calls the reward; by default "guard_only_reward" or "hybrid_reward". options: see
    `guardengine.rewards.GuardReward`.

    It logs to the completions' table the safety of thinking and output, and as metrics the shares that are unsafe and
    that are refusals. Raises ConfigError for options; the function raises what GuardReward does.
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
    """The same as an async function on an AsyncEngine, which TRL runs beside its other async rewards, in a loop of its
    own: the engine must not have been used in another one."""
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
    """The values, after telling TRL what they come from. Names begin with the reward's: a trainer may have several."""
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
