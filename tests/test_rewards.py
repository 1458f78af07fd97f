"""Rewards: the report's equations case by case, what is judged of a completion, and both kinds of engine."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from fake_gen import AsyncFakeGen, FakeGen
from hypothesis import given
from hypothesis import strategies as st

from guardengine import AsyncEngine, Engine, Moderation, Policy, Verdict
from guardengine.errors import ConfigError, GuardEngineError, InvalidText, StreamTooLong
from guardengine.rewards import (
    AsyncGuardReward,
    GuardReward,
    Reward,
    guard_only_reward,
    hybrid_reward,
)
from guardengine.text.thinking import split_thinking

SAFETIES = ("Safe", "Unsafe", "Controversial", "Unparsable", "Unjudged")


class FakeStream(FakeGen):
    def answer(self, text: str) -> Moderation:  # type: ignore[override]
        found = super().answer(text)
        risk = "Unknown" if found.safety == "Unparsable" else found.safety
        action = "allow" if risk == "Safe" else "block"
        return Moderation(None, Verdict(action, risk, None, 3, "debounce", 0), [])


# -- the equations -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("thinking", "output", "expected"),
    [
        (None, "Safe", 1.0),
        ("Safe", "Safe", 1.0),
        ("Unsafe", "Safe", 0.0),
        ("Safe", "Unsafe", 0.0),
        ("Unsafe", "Unsafe", 0.0),
        ("Controversial", "Safe", 0.0),
        ("Safe", "Controversial", 0.0),
        (None, "Controversial", 0.0),
        (None, "Unparsable", 0.0),
        ("Unparsable", "Safe", 0.0),
    ],
)
def test_guard_only(thinking: str | None, output: str, expected: float) -> None:
    assert guard_only_reward(thinking, output) == expected


@pytest.mark.parametrize(
    ("thinking", "output", "is_refusal", "pm", "expected"),
    [
        ("Safe", "Safe", False, 3.5, 3.5),
        ("Safe", "Safe", False, -7.0, -7.0),
        (None, "Safe", False, 3.5, 3.5),
        (None, "Safe", True, 3.5, -5.0),
        (None, "Safe", True, -7.0, -7.0),  # min, not -5
        (None, "Unsafe", False, 3.5, -10.0),
        (None, "Unsafe", False, -12.0, -12.0),
        ("Unsafe", "Safe", False, 3.5, -10.0),
        ("Unsafe", "Safe", True, 3.5, -10.0),  # unsafe is asked before refusal
        (None, "Unsafe", True, -7.0, -10.0),
        (None, "Unparsable", False, 3.5, -10.0),
        (None, "Controversial", False, 3.5, -10.0),
    ],
)
def test_hybrid(thinking: str | None, output: str, is_refusal: bool, pm: float, expected: float) -> None:
    assert hybrid_reward(thinking, output, is_refusal, pm) == expected


def test_hybrid_with_controversial_as_no_offence() -> None:
    assert hybrid_reward("Controversial", "Controversial", False, 3.0, controversial_is_unsafe=False) == 3.0
    assert hybrid_reward("Controversial", "Safe", True, 3.0, controversial_is_unsafe=False) == -5.0
    assert hybrid_reward("Unparsable", "Safe", False, 3.0, controversial_is_unsafe=False) == -10.0


@given(st.none() | st.sampled_from(SAFETIES), st.sampled_from(SAFETIES), st.booleans(), st.floats(-50, 50))
def test_the_equations_agree_on_what_is_safe(thinking, output, is_refusal, pm) -> None:
    hybrid = hybrid_reward(thinking, output, is_refusal, pm)
    if guard_only_reward(thinking, output):
        assert hybrid == (min(-5, pm) if is_refusal else pm)
    else:
        assert hybrid == min(-10, pm)


# -- thinking ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "thinking", "output"),
    [
        ("plain", None, "plain"),
        ("", None, ""),
        ("<think>\na\n</think>\n\nb", "a", "b"),
        ("a\n</think>\n\nb", "a", "b"),  # the prompt opened it
        ("<think>\n\n</think>\n\nb", None, "b"),
        ("<think>a</think>", "a", ""),
        ("<think>a, cut off", "a, cut off", ""),
        ("said <think>a", "said \na", ""),
        ("before<think>a</think>b", "before\na", "b"),
        ("<think>a</think>b<think>c</think>d", "a\nb\nc", "d"),  # nothing is left out
        ("<think>a</think>b<think>c", "a", "b\nc"),
        ("<thi<think>nk>a</think>b", "<thi\nnk>a", "b"),
    ],
)
def test_split_thinking(text: str, thinking: str | None, output: str) -> None:
    assert split_thinking(text) == (thinking, output)


@given(st.lists(st.sampled_from(["<think>", "</think>", "a", "b", " ", "\n", "<", "think>"])).map("".join))
def test_no_text_is_in_neither_part_and_no_tag_in_either(text: str) -> None:
    thinking, output = split_thinking(text)
    letters = [c for c in text.replace("<think>", "").replace("</think>", "") if c in "ab"]
    assert [c for c in (thinking or "") + output if c in "ab"] == letters
    if "<think>" in text or "</think>" in text:
        for part in (thinking or "", output):
            assert "<think>" not in part
            assert "</think>" not in part


# -- what is judged ----------------------------------------------------------------------------------------


def test_all_texts_are_judged_in_one_call() -> None:
    engine = FakeGen()
    prompts: list[Any] = ["x", [{"role": "system", "content": "s"}, {"role": "user", "content": "y"}]]
    completions: list[Any] = [
        "<think>t</think>o",
        [{"role": "assistant", "content": "p", "reasoning_content": "Unsafe r", "tool_calls": None}],
    ]
    rewards = GuardReward(engine)(prompts, completions)
    user, assistant = "user", "assistant"
    assert [[(m["role"], m["content"]) for m in messages] for messages in engine.asked[0]] == [
        [(user, "x"), (assistant, "t")],
        [(user, "x"), (assistant, "o")],
        [("system", "s"), (user, "y"), (assistant, "Unsafe r")],
        [("system", "s"), (user, "y"), (assistant, "p")],
    ]
    assert len(engine.asked) == 1
    assert rewards == [
        Reward(1.0, "Safe", "Safe", False, None),
        Reward(0.0, "Unsafe", "Safe", False, None),
    ]


def test_every_message_of_the_assistants_is_judged_where_it_stands() -> None:
    engine = FakeGen()
    completion = [
        {"role": "assistant", "content": "<think>t1</think>Unsafe o1", "tool_calls": [{"name": "f"}]},
        {"role": "tool", "content": "result"},
        {"role": "assistant", "content": "", "tool_calls": [{"name": "g"}]},  # says nothing
        {"role": "tool", "content": [{"type": "text", "text": "more"}]},
        {"role": "assistant", "content": "o2, refuse"},
    ]
    (reward,) = GuardReward(engine, "hybrid")(["x"], [completion], [1.0])
    said = [[m["content"] for m in messages] for messages in engine.asked[0]]
    assert said == [
        ["x", "t1"],
        ["x", "Unsafe o1"],
        ["x", "Unsafe o1", "result", "", "more", "o2, refuse"],
    ]
    assert reward == Reward(-10.0, "Safe", "Unsafe", True, 1.0)


def test_of_several_messages_the_worst_counts_and_the_last_may_be_a_refusal() -> None:
    turns = [
        {"role": "assistant", "content": "<think>Controversial</think>refuse"},
        {"role": "tool", "content": "result"},
        {"role": "assistant", "content": "<think>fine</think>fine"},
    ]
    (reward,) = GuardReward(FakeGen())(["x"], [turns])
    assert reward == Reward(0.0, "Controversial", "Safe", False, None)
    (reward,) = GuardReward(FakeGen())(["x"], [turns[::-1]])
    assert reward == Reward(0.0, "Controversial", "Safe", True, None)


def test_a_table_of_cases_by_every_engine() -> None:
    table = [  # completion, guard-only, hybrid with pm 2
        ("fine", 1.0, 2.0),
        ("<think>fine</think>fine", 1.0, 2.0),
        ("<think>Unsafe</think>fine", 0.0, -10.0),
        ("<think>fine</think>Unsafe", 0.0, -10.0),
        ("Controversial", 0.0, -10.0),
        ("Unparsable", 0.0, -10.0),
        ("refuse", 1.0, -5.0),
        ("<think>refuse</think>fine", 1.0, 2.0),  # whether the output is a refusal is asked, not the thinking
        ("<think>Unsafe</think>refuse", 0.0, -10.0),
        ("cut off: no line about refusal", 1.0, -10.0),  # hybrid needs the whole answer
    ]
    completions = [completion for completion, _, _ in table]
    prompts = ["x"] * len(table)
    pm = [2.0] * len(table)
    only, hybrid = [each[1] for each in table], [each[2] for each in table]

    def values(rewards: Sequence[Reward]) -> list[float]:
        return [reward.value for reward in rewards]

    assert values(GuardReward(FakeGen())(prompts, completions)) == only
    assert values(GuardReward(FakeStream())(prompts, completions)) == only
    assert values(GuardReward(FakeGen(), "hybrid")(prompts, completions, pm)) == hybrid
    assert values(asyncio.run(AsyncGuardReward(AsyncFakeGen())(prompts, completions))) == only
    assert values(asyncio.run(AsyncGuardReward(AsyncFakeGen(), "hybrid")(prompts, completions, pm))) == hybrid


def test_the_preference_function_is_asked_once_about_prompts_and_outputs() -> None:
    asked: list[Any] = []

    def preference(pairs: list[Any]) -> list[float]:
        asked.append(pairs)
        return [float(len(output)) for _, output in pairs]

    async def later(pairs: list[Any]) -> list[float]:
        return preference(pairs)

    completions = ["<think>t</think>four", "<think>Unsafe</think>fi"]
    rewards = GuardReward(FakeGen(), "hybrid", preference=preference)(["x", "y"], completions)
    assert asked == [[("x", "four"), ("y", "fi")]]
    assert [(reward.value, reward.preference) for reward in rewards] == [(4.0, 4.0), (-10.0, 2.0)]
    for function in (preference, later):
        again = AsyncGuardReward(AsyncFakeGen(), "hybrid", preference=function)
        assert asyncio.run(again(["x", "y"], completions)) == rewards
    with pytest.raises(ConfigError, match="AsyncGuardReward"):
        GuardReward(FakeGen(), "hybrid", preference=later)(["x", "y"], completions)


def test_hybrid_needs_a_gen_checkpoint() -> None:
    calls: list[Any] = []
    reward = GuardReward(FakeStream(), "hybrid", preference=lambda pairs: calls.append(pairs) or [1.0])
    with pytest.raises(ConfigError, match="Stream checkpoint does not say"):
        reward(["x"], ["y"])
    assert not calls  # nothing was scored for nothing


def test_the_policy_is_the_engines() -> None:
    engine, policy = FakeStream(), Policy.loose()
    GuardReward(engine, policy=policy)(["x"], ["y"])
    assert engine.policies == [policy]


@pytest.mark.parametrize("bad", [[1.0], [1.0, 2.0, 3.0], [1.0, math.nan], [1.0, "a"], [1.0, math.inf], 3])
def test_scores_are_checked(bad: Any) -> None:
    with pytest.raises(ConfigError, match="preference score"):
        GuardReward(FakeGen(), "hybrid")(["x", "x"], ["y", "y"], bad)
    with pytest.raises(ConfigError, match="preference score"):
        GuardReward(FakeGen(), "hybrid", preference=lambda _: bad)(["x", "x"], ["y", "y"])


def test_options_are_checked() -> None:
    for options in (
        {"equation": "magic"},
        {"on_unjudged": "ignore"},
        {"equation": "hybrid", "preference": [1.0]},
        {"preference": len},
    ):
        with pytest.raises(ConfigError):
            GuardReward(FakeGen(), **options)  # type: ignore[arg-type]
    for reward, scores in (
        (GuardReward(FakeGen()), [1.0]),
        (GuardReward(FakeGen(), "hybrid"), None),
        (GuardReward(FakeGen(), "hybrid", preference=lambda pairs: [1.0]), [1.0]),
    ):
        with pytest.raises(ConfigError, match="preference"):
            reward(["x"], ["y"], scores)
    with pytest.raises(ConfigError, match="2 prompts and 1 completions"):
        GuardReward(FakeGen())(["x", "x"], ["y"])


@pytest.mark.parametrize(
    "completion",
    [3, [], [3], [{"role": "tool", "content": "x"}], [{"role": "assistant", "content": 3}]],
)
def test_completions_that_are_none(completion: Any) -> None:
    with pytest.raises(InvalidText, match=r"^completions\[1\]: "):
        GuardReward(FakeGen())(["x", "x"], ["y", completion])


# -- conversations that the engine refuses -----------------------------------------------------------------


def test_a_completion_that_is_too_long_is_named_or_counts_as_unsafe() -> None:
    completions = ["fine", "<think>too long</think>fine", "fine"]
    with pytest.raises(StreamTooLong, match=r"^completions\[1\], its thinking: 9000 tokens"):
        GuardReward(FakeGen())(["x"] * 3, completions)
    rewards = GuardReward(FakeGen(), on_unjudged="unsafe")(["x"] * 3, completions)
    assert [reward.value for reward in rewards] == [1.0, 0.0, 1.0]
    assert (rewards[1].thinking, rewards[1].output) == ("Unjudged", "Safe")
    again = AsyncGuardReward(AsyncFakeGen(), on_unjudged="unsafe")
    assert asyncio.run(again(["x"] * 3, completions)) == rewards


def test_other_errors_pass() -> None:
    class Broken(FakeGen):
        def moderate_many(self, *arguments: Any, **options: Any) -> list[Any]:
            raise GuardEngineError("broken")

    with pytest.raises(GuardEngineError, match="broken"):
        GuardReward(Broken(), on_unjudged="unsafe")(["x", "x"], ["y", "y"])


# -- a real engine -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_real_stream_checkpoint(checkpoints: Callable[..., Path]) -> None:
    folder = checkpoints(dtype="float32")
    if not (folder / "tokenizer.json").exists():
        pytest.skip("no Qwen vocabulary at hand")
    prompts: list[Any] = ["How do I bake bread?", [{"role": "user", "content": "hi"}], "x", "y"]
    completions = [
        "Mix flour and water, then wait.",
        "<think>\nThey want bread.\n</think>\n\nMix flour.",
        "",
        "<think>cut",
    ]
    with Engine.from_pretrained(folder, kv_cache_bytes=2**22, max_model_len=64, num_threads=1) as engine:
        rewards = GuardReward(engine)(prompts, completions)
        for prompt, completion, reward in zip(prompts, completions, rewards, strict=True):
            x = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            parts = [part for part in split_thinking(completion) if part is not None]
            risks = []
            for part in parts:
                verdict = engine.moderate([*x, {"role": "assistant", "content": part}]).response
                assert verdict is not None
                risks.append(verdict.risk)
            assert reward.value == float(all(risk == "Safe" for risk in risks))
            assert [reward.thinking, reward.output][-len(risks) :] == risks
        with pytest.raises(StreamTooLong, match=r"completions\[1\], its output: .*max_model_len=64"):
            GuardReward(engine)(["x", "x"], ["y", "word " * 100])
        many = GuardReward(engine, on_unjudged="unsafe")(["x", "x"], [completions[0], "word " * 100])
        assert [reward.output == "Unjudged" for reward in many] == [False, True]
        engine.check_integrity()

    async def from_async() -> list[Reward]:
        async with AsyncEngine.from_pretrained(folder, kv_cache_bytes=2**22, max_model_len=64) as engine:
            return await AsyncGuardReward(engine)(prompts, completions)

    assert asyncio.run(from_async()) == rewards
