"""Adapters for TRL and verl: called as these call them."""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from fake_gen import AsyncFakeGen, FakeGen
from training import COMPLETIONS, Trainer

from guardengine.errors import ConfigError
from guardengine.integrations import trl, verl


def test_trl_calls_guard_only() -> None:
    trainer, function = Trainer(), trl.guard_reward(FakeGen())
    assert function.__name__ == "guard_only_reward"
    assert not inspect.iscoroutinefunction(function)
    assert function(**trainer.arguments(COMPLETIONS, answer=["a"] * 3)) == [1.0, 0.0, 1.0]
    assert trainer.extra == {
        "guard_only_reward/thinking": ["-", "Unsafe", "-"],
        "guard_only_reward/output": ["Safe", "Safe", "Safe"],
    }
    assert trainer.metrics == {"guard_only_reward/unsafe": [1 / 3], "guard_only_reward/refusal": [1 / 3]}
    function(**trainer.arguments(["Unsafe", "Controversial", "<think>fine</think>fine"]))
    assert trainer.metrics["guard_only_reward/unsafe"][1] == 2 / 3
    messages = [[{"role": "assistant", "content": text}] for text in COMPLETIONS]
    assert function(**trainer.arguments(messages)) == [1.0, 0.0, 1.0]
    assert function(prompts=["x"], completions=["fine"]) == [1.0]  # older releases pass less


def test_trl_calls_hybrid() -> None:
    function = trl.guard_reward(FakeGen(), "hybrid", preference_column="pm", name="safety")
    assert function.__name__ == "safety"
    assert function(**Trainer().arguments(COMPLETIONS, pm=[2.0, 2.0, 2.0])) == [2.0, -10.0, -5.0]
    with pytest.raises(ConfigError, match="preference_column='pm'"):
        function(**Trainer().arguments(COMPLETIONS))
    function = trl.guard_reward(FakeGen(), "hybrid", preference=lambda pairs: [3.0] * len(pairs))
    assert function.__name__ == "hybrid_reward"
    assert function(**Trainer().arguments(COMPLETIONS)) == [3.0, -10.0, -5.0]


def test_trl_awaits_async_functions() -> None:
    trainer, function = Trainer(), trl.async_guard_reward(AsyncFakeGen(), "hybrid", preference_column="pm")
    assert inspect.iscoroutinefunction(function)
    assert function.__name__ == "hybrid_reward"

    async def gather() -> list[Any]:
        arguments = trainer.arguments(COMPLETIONS, pm=[2.0, 2.0, 2.0])
        return await asyncio.gather(function(**arguments), function(**arguments))

    assert asyncio.run(gather()) == [[2.0, -10.0, -5.0]] * 2
    assert trainer.metrics["hybrid_reward/refusal"] == [1 / 3] * 2


# -- verl --------------------------------------------------------------------------------------------------


@pytest.fixture
def scores() -> Any:
    made = verl.GuardScores(AsyncFakeGen(), "hybrid", preference_key="pm")
    yield made
    made.close()


INFO = {"prompt": "x", "pm": 2.0, "index": 7}


def test_verl_calls_one_at_a_time(scores: verl.GuardScores) -> None:
    found = [
        scores.compute_score("d", text, "truth", INFO, reward_router_address=None) for text in COMPLETIONS
    ]
    assert [each["score"] for each in found] == [2.0, -10.0, -5.0]
    assert found[1] == {"score": -10.0, "guard_safe": 0.0, "guard_refusal": 0.0}
    assert found[2] == {"score": -5.0, "guard_safe": 1.0, "guard_refusal": 1.0}
    named = scores.compute_score(data_source="d", solution_str="fine", ground_truth=None, extra_info=INFO)
    assert named == found[0]


def test_verl_calls_from_loops_and_threads(scores: verl.GuardScores) -> None:
    assert inspect.iscoroutinefunction(scores.compute_score_async)

    async def gather() -> list[Any]:
        return await asyncio.gather(
            *(scores.compute_score_async("d", text, None, INFO) for text in COMPLETIONS)
        )

    for _ in range(2):  # loops of their own
        assert [each["score"] for each in asyncio.run(gather())] == [2.0, -10.0, -5.0]
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(
            lambda i: scores.compute_score("d", COMPLETIONS[i % 3], None, INFO)["score"], range(30)
        )
        assert list(found) == [2.0, -10.0, -5.0] * 10


def test_verl_calls_a_batch() -> None:
    engine = AsyncFakeGen()
    scores = verl.GuardScores(engine)
    prompt = np.array([{"role": "user", "content": "x"}], dtype=object)  # as Parquet gives it
    found = scores.compute_scores(
        data_sources=["d"] * 3,
        solution_strs=COMPLETIONS,
        ground_truths=[None] * 3,
        extra_infos=np.array([{"prompt": prompt}] * 3, dtype=object),
    )
    scores.close()
    assert [each["score"] for each in found] == [1.0, 0.0, 1.0]
    assert len(engine.asked) == 1
    assert engine.asked[0][0] == [{"role": "user", "content": "x"}, {"role": "assistant", "content": "fine"}]


def test_verl_is_told_what_is_missing(scores: verl.GuardScores) -> None:
    for info, says in (
        (None, "extra_info has no 'prompt'"),
        ({"question": "x"}, "it has question"),
        ({"prompt": "x"}, "no 'pm'"),
    ):
        with pytest.raises(ConfigError, match=says):
            scores.compute_score("d", "fine", None, info)
    with pytest.raises(ConfigError, match="1 solutions and 2 extra_infos"):
        scores.compute_scores(["d"], ["fine"], [None], [INFO, INFO])
    with pytest.raises(ConfigError, match=r"reward_kwargs\.checkpoint is missing"):
        verl.compute_score("d", "fine", None, INFO)


def test_verl_loads_the_file_and_the_engine_once(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("custom_module", verl.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, "custom_module", module)
    spec.loader.exec_module(module)
    loaded: list[Any] = []

    def load(path: str, **options: Any) -> AsyncFakeGen:
        loaded.append((path, options))
        return AsyncFakeGen()

    monkeypatch.setattr(module.AsyncEngine, "from_pretrained", load)
    kwargs = {"checkpoint": "folder", "engine_options": {"num_threads": 1}, "sandbox_fusion_url": None}
    info = {"prompt": "x"}
    assert module.compute_score("d", "fine", None, info, **kwargs)["score"] == 1.0
    assert module.compute_score("d", "too long", None, info, **kwargs)["score"] == 0.0  # does not end the run
    assert asyncio.run(module.compute_score_async("d", "Unsafe", None, info, **kwargs))["score"] == 0.0
    assert module.compute_scores(["d"], ["fine"], [None], [info], **kwargs)[0]["score"] == 1.0
    assert loaded == [("folder", {"revision": None, "num_threads": 1})]
    for made in module._made.values():
        made.close()
