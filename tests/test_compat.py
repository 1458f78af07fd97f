"""AutoGuard behaves as the released remote code does, computed here with transformers."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from guardengine import AutoGuard, ConfigError, GuardEngineError, InvalidTokens, StreamClosed
from guardengine.bench.hf import HFGuard

NAMES = ("risk_level", "risk_prob", "category", "category_prob")


@pytest.fixture(scope="module")
def model(tiny: Path) -> AutoGuard:
    return AutoGuard.from_pretrained(
        tiny, torch_dtype=torch.float32, device_map="auto", trust_remote_code=True, kv_cache_bytes=2**23
    ).eval()


def released(tiny: Path, ids: list[int], role: str) -> dict[str, list]:
    """The four lists by definition: softmax, winning class, rounded to two digits, at every position."""
    hf = HFGuard(tiny, dtype=torch.float32)
    out = hf.forward(torch.tensor([ids]))
    prefix = "query_" if role == "user" else ""
    risk = getattr(out, f"{prefix}risk_level_logits")[0].softmax(-1).max(-1)
    category = getattr(out, f"{prefix}category_logits")[0].softmax(-1).max(-1)
    auto = AutoGuard.from_pretrained(tiny, kv_cache_bytes=2**20, max_model_len=64)
    risks = auto.query_risk_level_map if role == "user" else auto.response_risk_level_map
    categories = auto.query_category_map if role == "user" else auto.response_category_map
    return {
        "risk_level": [risks[int(i)] for i in risk.indices],
        "risk_prob": [round(float(x), 2) for x in risk.values],
        "category": [categories[int(i)] for i in category.indices],
        "category_prob": [round(float(x), 2) for x in category.values],
    }


def assert_same(actual: dict[str, list], expected: dict[str, list]) -> None:
    assert list(actual) == list(NAMES)
    for name in ("risk_level", "category"):
        assert actual[name] == expected[name]
    for name in ("risk_prob", "category_prob"):
        assert actual[name] == pytest.approx(
            expected[name], abs=0.0101
        )  # a rounding boundary may fall between


def test_readme_loop(model: AutoGuard, tiny: Path) -> None:
    prompt, response = list(range(40, 52)), list(range(300, 310))
    result, state = model.stream_moderate_from_ids(torch.tensor(prompt), role="user", stream_state=None)
    assert_same(result, released(tiny, prompt, "user"))
    for count, token in enumerate(torch.tensor(response), 1):
        result, state = model.stream_moderate_from_ids(token, role="assistant", stream_state=state)
        assert all(len(result[name]) == len(prompt) + count for name in NAMES)
    assert_same(result, released(tiny, prompt + response, "assistant"))
    model.close_stream(state)
    assert model.engine.stats()["streams_open"] == 0


def test_results_are_snapshots(model: AutoGuard) -> None:
    first, state = model.stream_moderate_from_ids(torch.tensor([1, 2, 3]), role="user")
    before = {name: values[:] for name, values in first.items()}
    model.stream_moderate_from_ids(torch.tensor([4]), role="user", stream_state=state)
    assert first == before
    model.close_stream(state)


def test_only_new_tokens_are_computed(model: AutoGuard) -> None:
    _, state = model.stream_moderate_from_ids(torch.arange(200), role="user")
    before = model.engine.stats()["tokens_computed"]
    for token in range(5):
        model.stream_moderate_from_ids(token, role="assistant", stream_state=state)
    assert model.engine.stats()["tokens_computed"] - before == 5
    model.close_stream(state)


def test_two_conversations_at_once(model: AutoGuard, tiny: Path) -> None:
    _, a = model.stream_moderate_from_ids(torch.tensor([1, 2, 3]), role="user")
    _, b = model.stream_moderate_from_ids(torch.tensor([9, 8]), role="user")
    result_a, _ = model.stream_moderate_from_ids(4, role="assistant", stream_state=a)
    result_b, _ = model.stream_moderate_from_ids([7], role="assistant", stream_state=b)
    assert_same(result_a, released(tiny, [1, 2, 3, 4], "assistant"))
    assert_same(result_b, released(tiny, [9, 8, 7], "assistant"))
    model.close_stream(a)
    model.close_stream(b)


def test_a_forgotten_state_frees_its_memory(model: AutoGuard) -> None:
    model.stream_moderate_from_ids(torch.arange(30), role="user")
    gc.collect()
    assert model.engine.stats()["streams_open"] == 0
    assert model.engine.stats()["kv_blocks_free"] == model.engine.stats()["kv_blocks_total"]


def test_wrong_calls(model: AutoGuard) -> None:
    with pytest.raises(ValueError, match="Role must be either 'user' or 'assistant'"):
        model.stream_moderate_from_ids(torch.tensor([1]), role="system")
    for bad in (torch.tensor([[1, 2]]), [], torch.tensor([1.0]), [10**9]):
        with pytest.raises(InvalidTokens):
            model.stream_moderate_from_ids(bad, role="user")
    _, state = model.stream_moderate_from_ids([1], role="user")
    model.close_stream(state)
    model.close_stream(state)
    with pytest.raises(StreamClosed):
        model.stream_moderate_from_ids([1], role="user", stream_state=state)
    assert model.engine.stats()["streams_open"] == 0


def test_maps_are_int_keyed(model: AutoGuard) -> None:
    assert model.response_risk_level_map == {0: "Safe", 1: "Unsafe", 2: "Controversial"}
    assert model.query_risk_level_map == model.response_risk_level_map
    assert model.query_category_map[8] == "Jailbreak"
    assert 8 not in model.response_category_map


# -- forward -----------------------------------------------------------------------------------------------


def test_forward_shapes_and_logits_to_keep(model: AutoGuard, tiny: Path) -> None:
    ids = torch.arange(24).view(2, 12)
    out = model(input_ids=ids)
    assert [out.risk_level_logits.shape, out.category_logits.shape] == [(2, 12, 3), (2, 12, 8)]
    assert [out.query_risk_level_logits.shape, out.query_category_logits.shape] == [(2, 12, 3), (2, 12, 9)]
    last = model.forward(input_ids=ids, logits_to_keep=1)
    torch.testing.assert_close(last.category_logits, out.category_logits[:, -1:])
    expected = HFGuard(tiny, dtype=torch.float32).forward(ids)
    torch.testing.assert_close(out.risk_level_logits, expected.risk_level_logits, atol=1e-4, rtol=0)


def test_left_padding_equals_no_padding(model: AutoGuard) -> None:
    ids = torch.arange(1, 7)
    padded = torch.cat((torch.zeros(3, dtype=torch.long), ids))[None]
    mask = torch.cat((torch.zeros(3), torch.ones(6)))[None]
    out = model(input_ids=padded, attention_mask=mask).risk_level_logits[0, 3:]
    torch.testing.assert_close(out, model(input_ids=ids[None]).risk_level_logits[0], atol=1e-4, rtol=0)


def test_the_causal_mask_of_the_eval_script(model: AutoGuard) -> None:
    ids = torch.arange(5)[None]
    causal = torch.tril(torch.ones(5, 5, dtype=torch.bool))[None, None]
    torch.testing.assert_close(
        model(input_ids=ids, attention_mask=causal).category_logits, model(input_ids=ids).category_logits
    )


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(1, 4),
        torch.zeros(1, 5),
        torch.tensor([[1, 0, 1, 1, 1]]),
        torch.ones(1, 1, 5, 5),
    ],
)
def test_masks_that_are_not_padding(model: AutoGuard, mask: torch.Tensor) -> None:
    with pytest.raises(InvalidTokens, match="attention_mask"):
        model(input_ids=torch.arange(5)[None], attention_mask=mask)
    assert model.engine.stats()["streams_open"] == 0


def test_forward_refuses_what_it_would_ignore(model: AutoGuard) -> None:
    model(input_ids=torch.arange(3)[None], use_cache=False, past_key_values=None, return_dict=True)
    with pytest.raises(ConfigError, match="output_hidden_states"):
        model(input_ids=torch.arange(3)[None], output_hidden_states=True)
    for bad in (torch.arange(3), torch.empty(1, 0, dtype=torch.long), [[1, 2]]):
        with pytest.raises(GuardEngineError):
            model(input_ids=bad)  # type: ignore[arg-type]


def test_a_batch_larger_than_the_engine_runs_in_turns(tiny: Path) -> None:
    small = AutoGuard.from_pretrained(tiny, max_num_streams=2, kv_cache_bytes=2**16, max_model_len=64)
    large = AutoGuard.from_pretrained(tiny, kv_cache_bytes=2**22, max_model_len=64)
    ids = torch.arange(7 * 20).view(7, 20)
    torch.testing.assert_close(
        small(input_ids=ids).risk_level_logits, large(input_ids=ids).risk_level_logits, atol=1e-4, rtol=0
    )
