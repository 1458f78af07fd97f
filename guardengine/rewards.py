"""Rewards for reinforcement learning from a guard's judgements.

The equations are those of the Qwen3Guard Technical Report (arXiv 2510.14276), section 3.5.1. x is the prompt, t the
thinking, y the output, pm the score of a preference model for (x, y):

    guard-only   1.0         if is_safe(x, t) and is_safe(x, y)
                 0.0         otherwise
    hybrid       min(-10, pm)  if is_unsafe(x, t) or is_unsafe(x, y)
                 min(-5, pm)   else if is_refusal(x, y)
                 pm            otherwise

Only "Safe" is safe. A text that the guard could not judge (the answer cannot be parsed, the model failed, the text is
too long) counts as unsafe. Without thinking, only y is judged.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from guardengine.engine.moderator import Answer, AsyncModerator, Conversation, Moderator
from guardengine.errors import ConfigError, InvalidText
from guardengine.labels import UNPARSABLE, GenModeration, Moderation
from guardengine.policy import Policy
from guardengine.text.thinking import split_thinking

Equation = Literal["guard-only", "hybrid"]
OnUnjudged = Literal["raise", "unsafe"]
Text = str | Sequence[Mapping[str, Any]]  # a string, or messages
Pair = tuple[Text, str]  # a prompt as it was given, and an output
Preference = Callable[[list[Pair]], Sequence[float] | Awaitable[Sequence[float]]]

UNJUDGED = "Unjudged"  # a conversation that the engine refuses: too long, or no valid text
_SEVERITY = ("Safe", "Controversial", "Unsafe")  # what is none of these is worse

UNSAFE_CAP, REFUSAL_CAP = -10.0, -5.0


def guard_only_reward(thinking: str | None, output: str) -> float:
    """The guard-only reward of one completion: 1.0 when all of it is safe, else 0.0.

    Args:
        thinking: The safety of the thinking; None when there is none.
        output: The safety of the output.
    """
    return float(thinking in (None, "Safe") and output == "Safe")


def hybrid_reward(
    thinking: str | None,
    output: str,
    is_refusal: bool,
    preference: float,
    *,
    controversial_is_unsafe: bool = True,
) -> float:
    """The hybrid reward of one completion: its preference score, at most -10 when it is unsafe, else at most -5 when
    it is a refusal.

    Args:
        thinking: The safety of the thinking; None when there is none.
        output: The safety of the output.
        is_refusal: Whether the output refuses the request.
        preference: The score of the preference model, any finite number.
        controversial_is_unsafe: Whether "Controversial" counts as unsafe.
    """
    passed = ("Safe",) if controversial_is_unsafe else ("Safe", "Controversial")
    if output not in passed or (thinking is not None and thinking not in passed):
        return min(UNSAFE_CAP, preference)
    return min(REFUSAL_CAP, preference) if is_refusal else preference


@dataclass(frozen=True, slots=True)
class Reward:
    """The reward of one completion, and the judgements that it comes from.

    Attributes:
        value: The reward.
        thinking: The safety of the thinking, None when there is none; of several messages the worst.
        output: The safety of the output; of several messages the worst. "Unjudged" where the engine refused the text.
        is_refusal: Whether the last output is a refusal; None from a Stream checkpoint.
        preference: The score of the preference model; None for guard-only.
    """

    value: float
    thinking: str | None
    output: str
    is_refusal: bool | None
    preference: float | None


class _Part(NamedTuple):
    """A conversation whose last message is to be judged."""

    of: int  # which completion
    is_thinking: bool
    conversation: Conversation


class _Judged(NamedTuple):
    thinking: str | None
    output: str
    is_refusal: bool | None
    final_output: str  # text


class _Equations:
    """The part that both kinds of engine share: from completions to conversations, and from answers to rewards."""

    def __init__(
        self,
        equation: Equation = "guard-only",
        *,
        preference: Preference | None = None,
        controversial_is_unsafe: bool = True,
        on_unjudged: OnUnjudged = "raise",
        policy: Policy | None = None,
    ) -> None:
        if equation not in ("guard-only", "hybrid"):
            raise ConfigError(f"equation={equation!r}: choose 'guard-only' or 'hybrid'")
        if on_unjudged not in ("raise", "unsafe"):
            raise ConfigError(f"on_unjudged={on_unjudged!r}: choose 'raise' or 'unsafe'")
        if preference is not None and not callable(preference):
            raise ConfigError(
                "preference is a function from a list of (prompt, output) to a list of scores; pass scores that are "
                "known already as preferences=[...] of the call"
            )
        if preference is not None and equation == "guard-only":
            raise ConfigError("equation='guard-only' has no preference score; choose 'hybrid'")
        self.equation, self.preference, self.policy = equation, preference, policy
        self._controversial_is_unsafe, self._on_unjudged = controversial_is_unsafe, on_unjudged

    def parts_of(self, prompts: Sequence[Text], completions: Sequence[Text]) -> tuple[list[_Part], list[str]]:
        """All (x, t) and (x, y), and the final output of each completion."""
        if len(prompts) != len(completions):
            raise ConfigError(f"{len(prompts)} prompts and {len(completions)} completions: give one of each")
        parts, outputs = list[_Part](), list[str]()
        for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            try:
                found, output = _parts(index, prompt, completion)
            except InvalidText as error:
                raise InvalidText(f"completions[{index}]: {error}") from None
            parts += found
            outputs.append(output)
        return parts, outputs

    def judged(
        self, parts: Sequence[_Part], outputs: Sequence[str], answers: Sequence[Answer | Exception]
    ) -> list[_Judged]:
        """What the engine's answers to all parts say of each completion."""
        of_each: list[list[tuple[_Part, tuple[str, bool | None]]]] = [[] for _ in outputs]
        for part, answer in zip(parts, answers, strict=True):
            of_each[part.of].append((part, self._read(part, answer)))
        return [_worst(found, output) for found, output in zip(of_each, outputs, strict=True)]

    def _read(self, part: _Part, answer: Answer | Exception) -> tuple[str, bool | None]:
        """The safety and whether it is a refusal. Raises the error of the conversation, with the index of its
        completion."""
        if isinstance(answer, Moderation):
            if self.equation == "hybrid":
                raise ConfigError(
                    "equation='hybrid' asks whether a response is a refusal, which a Stream checkpoint does not say; "
                    "give an engine with a Gen checkpoint, or choose 'guard-only'"
                )
            return (answer.response.risk if answer.response else UNJUDGED), None
        if isinstance(answer, GenModeration):
            if answer.refusal is not None:
                return answer.safety, answer.refusal == "Yes"
            is_cut = self.equation == "hybrid" and answer.safety in ("Safe", "Controversial")
            return (UNPARSABLE if is_cut else answer.safety), None
        if self._on_unjudged == "raise":
            what = "thinking" if part.is_thinking else "output"
            raise type(answer)(
                f"completions[{part.of}], its {what}: {answer} (on_unjudged='unsafe' counts it as unsafe instead)"
            )
        return UNJUDGED, None

    def check_preferences(self, preferences: Sequence[float] | None, num_completions: int) -> None:
        """Raise ConfigError unless there are scores, or a function for them, where they are needed."""
        if self.equation == "guard-only":
            if preferences is not None:
                raise ConfigError("equation='guard-only' has no preference score; choose 'hybrid'")
        elif (preferences is None) == (self.preference is None):
            raise ConfigError(
                "equation='hybrid' needs preference scores: either a function (preference=) or a list for this call "
                "(preferences=)"
            )
        elif preferences is not None:
            _check_scores(preferences, num_completions)

    def rewards(self, judged: list[_Judged], preferences: Sequence[float] | None) -> list[Reward]:
        """Apply the equation. preferences: None for guard-only."""
        if preferences is None:
            return [
                Reward(guard_only_reward(each.thinking, each.output), *each[:3], preference=None)
                for each in judged
            ]
        return [
            Reward(
                hybrid_reward(
                    each.thinking,
                    each.output,
                    bool(each.is_refusal),
                    pm,
                    controversial_is_unsafe=self._controversial_is_unsafe,
                ),
                *each[:3],
                preference=pm,
            )
            for each, pm in zip(judged, _check_scores(preferences, len(judged)), strict=True)
        ]


class GuardReward(_Equations):
    """Rewards from an Engine. Call it with prompts and completions."""

    def __init__(self, engine: Moderator, equation: Equation = "guard-only", **options: Any) -> None:
        """Make the reward.

        Args:
            engine: An engine with a Gen checkpoint, as in the report. For guard-only a Stream checkpoint can be used
                too; then a text is as safe as its verdict under `policy`.
            equation: "guard-only" or "hybrid".
            **options: preference: for hybrid, a function from a list of (prompt, output) to a list of scores.
                controversial_is_unsafe: whether "Controversial" counts as unsafe in hybrid, True by default.
                on_unjudged: "raise" the error (default), or count as "unsafe", a completion that the engine refuses
                because it is too long or not valid text. policy: `Policy.strict()` by default.

        Raises:
            ConfigError: An option is not valid, or contradicts the equation.
        """
        super().__init__(equation, **options)
        self._engine = engine

    def __call__(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        preferences: Sequence[float] | None = None,
    ) -> list[Reward]:
        """The rewards of completions. All texts are judged in one call of the engine.

        Args:
            prompts: A user's text, or messages, for each completion.
            completions: An assistant's text, or messages. Of messages all of the assistant's are judged, and the last
                is the output. Thinking is the text before </think>, or reasoning_content.
            preferences: For hybrid, the preference score of each completion, where there is no `preference` function.

        Returns:
            One reward for each completion, in order.

        Raises:
            ConfigError: There are not as many prompts or scores as completions, or a score is not a finite number.
            InvalidText, InvalidTokens, StreamTooLong: A completion cannot be judged (with on_unjudged="raise"); the
                message has its index.
            GuardEngineError: Other errors of the engine.
        """
        self.check_preferences(preferences, len(completions))
        parts, outputs = self.parts_of(prompts, completions)
        asked = [part.conversation for part in parts]
        answers = self._engine.moderate_many(asked, self.policy, on_unfit="return")
        judged = self.judged(parts, outputs, answers)
        if self.preference is not None:
            scores = self.preference(_pairs(prompts, judged))
            if inspect.isawaitable(scores):
                if inspect.iscoroutine(scores):
                    scores.close()
                raise ConfigError("preference is an async function; use AsyncGuardReward with an AsyncEngine")
            preferences = scores
        return self.rewards(judged, preferences)


class AsyncGuardReward(_Equations):
    """Rewards from an AsyncEngine. Concurrent calls share its steps, and `preference` may be an async function."""

    def __init__(self, engine: AsyncModerator, equation: Equation = "guard-only", **options: Any) -> None:
        """Make the reward; raises ConfigError for options.

        Args:
            engine: An AsyncEngine; see `GuardReward` for the checkpoint.
            equation: "guard-only" or "hybrid".
            **options: The options of `GuardReward`.
        """
        super().__init__(equation, **options)
        self._engine = engine

    async def __call__(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        preferences: Sequence[float] | None = None,
    ) -> list[Reward]:
        """The rewards of completions. See `GuardReward.__call__`.

        Args:
            prompts: A user's text, or messages, for each completion.
            completions: An assistant's text, or messages, for each.
            preferences: For hybrid, the preference score of each, where there is no `preference` function.
        """
        self.check_preferences(preferences, len(completions))
        parts, outputs = self.parts_of(prompts, completions)
        asked = [part.conversation for part in parts]
        answers = await self._engine.moderate_many(asked, self.policy, on_unfit="return")
        judged = self.judged(parts, outputs, answers)
        if self.preference is not None:
            scores = self.preference(_pairs(prompts, judged))
            preferences = await scores if inspect.isawaitable(scores) else scores
        return self.rewards(judged, preferences)


def _pairs(prompts: Sequence[Text], judged: Sequence[_Judged]) -> list[Pair]:
    return [(prompt, each.final_output) for prompt, each in zip(prompts, judged, strict=True)]


def _parts(index: int, prompt: Text, completion: Text) -> tuple[list[_Part], str]:
    """Everything in a completion that is to be judged, and its final output."""
    context = _messages(prompt, "user")
    said = _messages(completion, "assistant")
    parts: list[_Part] = []
    output = ""
    last = max((i for i, message in enumerate(said) if message["role"] == "assistant"), default=None)
    if last is None:
        raise InvalidText("there is no message of the assistant's in it")
    for i, message in enumerate(said):
        if message["role"] == "assistant":
            thinking, output = split_thinking(message["content"])
            reasoning = split_thinking(message.pop("reasoning_content", ""))
            thinking = "\n".join(text for text in (*reasoning, thinking) if text and text.strip()) or None
            if thinking is not None:
                parts.append(_Part(index, True, [*context, {"role": "assistant", "content": thinking}]))
            message = {"role": "assistant", "content": output}
            if output.strip() or i == last:  # a message that only calls a tool says nothing
                parts.append(_Part(index, False, [*context, message]))
        context = [*context, message]
    return parts, output


def _messages(text: Text, role: str) -> list[dict[str, str]]:
    """Role, content and reasoning of messages. Their other fields are not text."""
    if isinstance(text, str):
        return [{"role": role, "content": text}]
    if not isinstance(text, Sequence):
        raise InvalidText(f"{type(text).__name__} is neither text nor a list of messages")
    found = []
    for message in text:
        if not isinstance(message, Mapping):
            raise InvalidText(
                f"{type(message).__name__} among the messages is no mapping with role and content"
            )
        kept = {"role": message.get("role"), "content": _content(message.get("content"))}
        if reasoning := message.get("reasoning_content"):
            kept["reasoning_content"] = _content(reasoning)
        found.append(kept)
    return found


def _content(content: Any) -> Any:
    """The text of a message's content: parts are joined, None is empty."""
    if content is None:
        return ""
    if isinstance(content, list | tuple):
        texts = [part.get("text", "") if isinstance(part, Mapping) else part for part in content]
        content = "\n".join(text for text in texts if isinstance(text, str) and text)
    if not isinstance(content, str):
        raise InvalidText(f"a message's content is {type(content).__name__}; text is needed")
    return content


def _worst(found: list[tuple[_Part, tuple[str, bool | None]]], output: str) -> _Judged:
    """The judgements of one completion as one. The last output decides whether it is a refusal."""
    thinking = [safety for part, (safety, _) in found if part.is_thinking]
    said = [(safety, is_refusal) for part, (safety, is_refusal) in found if not part.is_thinking]
    return _Judged(
        max(thinking, key=_severity, default=None),
        max((safety for safety, _ in said), key=_severity),
        said[-1][1],
        output,
    )


def _severity(safety: str) -> int:
    return _SEVERITY.index(safety) if safety in _SEVERITY else len(_SEVERITY)


def _check_scores(scores: Any, num_completions: int) -> list[float]:
    try:
        checked = [float(score) for score in scores]
    except (TypeError, ValueError) as error:
        raise ConfigError(f"preference scores: {error}; a list of numbers is needed") from None
    if len(checked) != num_completions:
        raise ConfigError(
            f"{len(checked)} preference scores for {num_completions} completions; give one each"
        )
    for index, score in enumerate(checked):
        if not math.isfinite(score):
            raise ConfigError(f"preference score {index} is {score}; it must be finite")
    return checked
