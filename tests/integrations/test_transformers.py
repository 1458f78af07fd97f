"""transformers' generate() under guard: real generation with a tiny random LLM, whose tokens a script dictates."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from launching import sync_engine
from transformers import LogitsProcessor, Qwen3Config, Qwen3ForCausalLM, TextStreamer

from guardengine import Engine, Policy, Stream
from guardengine.errors import ConfigError
from guardengine.integrations.transformers import GuardedStreamer, GuardStoppingCriteria
from guardengine.text.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("bombs_are_unsafe")

END, PAD = 151645, 151643
PROMPT = torch.tensor([[PAD, 9707, 11, 1879]])
SAFE, BAD = "The capital is Paris 巴黎.", "Take a big bomb and run far away"


@pytest.fixture(scope="module")
def llm() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=151936,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=16,
        eos_token_id=END,
        pad_token_id=PAD,
    )
    return Qwen3ForCausalLM(config).eval()


@pytest.fixture(scope="module")
def engine(folder) -> Any:
    with sync_engine(folder) as engine:
        yield engine
        engine.check_integrity()


class Script(LogitsProcessor):
    """Each row's next token is the script's."""

    def __init__(self, *rows: list[int]) -> None:
        self.rows = rows

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        at = input_ids.shape[1] - PROMPT.shape[1]
        scores = torch.full_like(scores, -torch.inf)
        for row, script in enumerate(self.rows):
            scores[row, script[at] if at < len(script) else END] = 0.0
        return scores


def opened(engine: Engine, **policy: Any) -> Stream:
    policy = {"debounce": 1, **policy}
    return engine.open(messages=[{"role": "user", "content": "Where?"}], policy=Policy.strict(**policy))


def generate(
    llm: Any, criteria: Any, *rows: list[int], streamer: Any = None, **options: Any
) -> list[list[int]]:
    ids = PROMPT.repeat(len(rows), 1)
    found = llm.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        stopping_criteria=criteria and [criteria],
        streamer=streamer,
        logits_processor=[Script(*rows)],
        **{"max_new_tokens": 40, "do_sample": False, **options},
    )
    return found[:, PROMPT.shape[1] :].tolist()


def guard(engine: Engine, *streams: Stream, **options: Any) -> GuardStoppingCriteria:
    return GuardStoppingCriteria(
        engine, streams, num_prompt_tokens=PROMPT.shape[1], eos_token_id=END, **options
    )


def test_rows_are_stopped_and_judged_alone(engine: Engine, llm: Any, tokenizer: Tokenizer) -> None:
    safe, bad, short = (tokenizer.encode_text(text) for text in (SAFE, BAD, "Yes"))
    streams = [opened(engine) for _ in range(3)]
    criteria = guard(engine, *streams)
    found = generate(llm, criteria, safe, bad, short)
    num_bad = bad.index(tokenizer.encode_text(" bomb")[0]) + 1
    assert found[0][: len(safe) + 1] == [*safe, END]
    assert found[1][:num_bad] == bad[:num_bad]
    assert set(found[1][num_bad:]) <= {PAD}  # it stopped there
    assert [verdict.action for verdict in criteria.finish()] == ["allow", "block", "allow"]
    for stream, ids in zip(streams, ([*safe, END], bad[:num_bad], [*short, END]), strict=True):
        assert [label.token_id for label in stream.labels] == ids  # no padding
        with opened(engine) as twin:
            twin.append(ids)
            engine.run()
            assert [x.risk for x in twin.labels] == [x.risk for x in stream.labels]
        stream.close()
    assert criteria.finish()[0].action == "allow"  # again: nothing to do


@pytest.mark.parametrize("hold_back", [0, 3])
def test_the_streamer_hands_on_what_is_cleared(
    engine: Engine, llm: Any, tokenizer: Tokenizer, hold_back: int
) -> None:
    for text in (SAFE, BAD):
        ids = tokenizer.encode_text(text)
        with opened(engine, hold_back=hold_back) as stream:
            criteria, out = guard(engine, stream), []

            def inner(more: list[int], out: list[int] = out, stream: Stream = stream) -> None:
                out += more
                is_whole = stream._state.turns[-1].is_closed  # type: ignore[index]
                assert is_whole or len(out) <= stream.verdict.cleared

            generate(llm, criteria, ids, streamer=GuardedStreamer(criteria, inner))
            if text is SAFE:
                assert out == [*ids, END]
            else:
                assert tokenizer.decode(out) == ("Take a big" if not hold_back else "")
                assert len(stream.labels) == len(out) + 1 + hold_back


def test_with_transformers_own_streamer(engine: Engine, llm: Any, tokenizer: Tokenizer, capsys) -> None:
    class Decoder(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            shown.append(text)

    shown: list[str] = []
    own = SimpleNamespace(decode=lambda ids, **_: tokenizer.decode(ids))
    with opened(engine) as stream:
        criteria = guard(engine, stream)
        ids = tokenizer.encode_text(BAD)
        generate(llm, criteria, ids, streamer=GuardedStreamer(criteria, Decoder(own, skip_prompt=True)))
        assert "".join(shown) == "Take a big"


@pytest.mark.parametrize("streamer_is_first", [True, False])
def test_either_order_and_no_criteria(
    engine: Engine, llm: Any, tokenizer: Tokenizer, streamer_is_first: bool
) -> None:
    ids = tokenizer.encode_text(BAD)
    with opened(engine) as stream, opened(engine) as other:
        criteria, out = guard(engine, stream), []
        streamer = GuardedStreamer(criteria, out.extend)
        streamer.put(PROMPT)
        sequence = PROMPT
        for token_id in ids:
            token = torch.tensor([token_id])
            sequence = torch.cat([sequence, token[:, None]], dim=1)
            if streamer_is_first:
                streamer.put(token)
            is_done = criteria(sequence, None)
            if not streamer_is_first:
                streamer.put(token)
            assert is_done.dtype == torch.bool
            assert is_done.tolist() == [stream.verdict.action == "block"]
        streamer.end()
        assert tokenizer.decode(out) == "Take a big"
        found: list[int] = []
        generate(llm, None, ids, streamer=GuardedStreamer(guard(engine, other), found.extend))
        assert found == out


def test_another_tokenizer(engine: Engine, llm: Any, tokenizer: Tokenizer) -> None:
    """Here one whose ids are bytes."""
    foreign = SimpleNamespace(decode=lambda ids: bytes(x for x in ids if x < 256).decode(errors="replace"))
    for text, expected in ((SAFE, [*SAFE.encode(), END]), (BAD, [*b"Take a big"])):
        with opened(engine) as stream:
            criteria, out = guard(engine, stream, tokenizer=foreign), []
            generate(llm, criteria, [*text.encode()], streamer=GuardedStreamer(criteria, out.extend))
            assert out == expected
            ids = tokenizer.encode_text(text)
            assert [label.token_id for label in stream.labels] == (
                [*ids, END] if text is SAFE else ids[: len(stream.labels)]
            )


def test_assisted_generation(engine: Engine, llm: Any, tokenizer: Tokenizer) -> None:
    """Several tokens in one call, from the first one on."""
    ids = tokenizer.encode_text(SAFE)
    with opened(engine) as stream:
        criteria, sequence = guard(engine, stream), torch.tensor([[*PROMPT[0].tolist(), *ids]])
        criteria(sequence[:, :7], None)
        criteria(sequence, None)
        criteria.finish()
        assert [label.token_id for label in stream.labels] == [*ids, END]


def test_beam_search_is_refused(engine: Engine, llm: Any) -> None:
    streams = [opened(engine) for _ in range(4)]
    for count in (1, 2, 4):
        with pytest.raises(ConfigError, match=r"beam search"):
            llm.generate(
                PROMPT,
                attention_mask=torch.ones_like(PROMPT),
                num_beams=2,
                max_new_tokens=20,
                stopping_criteria=[guard(engine, *streams[:count])],
            )
    for stream in streams:
        stream.close()


def test_misuse(engine: Engine, llm: Any, tokenizer: Tokenizer) -> None:
    with opened(engine) as stream, opened(engine) as other:
        for streams, options in (
            ([], {}),
            (["stream"], {}),
            ([stream, stream], {}),
            ([stream], {"num_prompt_tokens": -1}),
            ([stream, other], {"eos_token_id": None}),
        ):
            with pytest.raises(ConfigError):
                GuardStoppingCriteria(
                    engine, streams, **{"num_prompt_tokens": 4, "eos_token_id": [END], **options}
                )
        criteria = guard(engine, stream)
        with pytest.raises(ConfigError, match="one row"):
            GuardedStreamer(guard(engine, stream, other), print)
        with pytest.raises(ConfigError, match="a streamer or a function"):
            GuardedStreamer(criteria, "stdout")  # type: ignore[arg-type]
        generate(llm, criteria, tokenizer.encode_text(SAFE))
        with pytest.raises(ConfigError, match="each call of generate"):
            generate(llm, criteria, tokenizer.encode_text(SAFE))
        with pytest.raises(ConfigError, match="num_prompt_tokens=4"):
            guard(engine, other)(PROMPT[:, :3], None)
