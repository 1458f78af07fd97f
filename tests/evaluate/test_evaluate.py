"""`guardengine evaluate`: what it reads, that its labels are the engine's, and what it writes."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from labelled_rows import PLAIN, THINKING, USER, record, write

from guardengine import Engine, GenModeration, Policy, Verdict
from guardengine.cli import main
from guardengine.errors import ConfigError, InvalidText, StreamTooLong
from guardengine.evaluate import predict
from guardengine.evaluate import run as evaluating
from guardengine.evaluate.metrics import Detection
from guardengine.evaluate.predict import Aim, judge_gen, judge_stream, lay_out
from guardengine.evaluate.rows import BadRows, Row
from guardengine.evaluate.run import evaluate
from guardengine.text.chat_template import ChatTemplate
from guardengine.text.tokenizer import Tokenizer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def _tokenizers_are_read_once() -> Iterator[None]:
    """They take a second, and do not change."""
    with pytest.MonkeyPatch.context() as patch:
        for name in (Tokenizer, ChatTemplate):
            patch.setattr(name, "from_dir", staticmethod(functools.cache(name.from_dir)))
        yield


@pytest.fixture(scope="module")
def tiny(checkpoints: Callable[..., Path]) -> Path:
    folder = checkpoints(dtype="float32")
    if not (folder / "tokenizer.json").exists():
        pytest.skip("no Qwen vocabulary at hand")
    return folder


# -- Stream ------------------------------------------------------------------------------------------------


def row(*messages: dict[str, str], **fields: Any) -> Row:
    known = {"is_unsafe": True, "span": None, "token_ids": None}
    return Row(Path("a.jsonl"), "a.jsonl, line 1", list(messages), **known | fields)


def laid_out(
    tiny: Path, *rows: Row, bad_rows: BadRows | None = None, limit: int = 8192, **aim: Any
) -> list[predict.Judged]:
    return lay_out(rows, Aim(**aim), chat_of(tiny), limit, bad_rows or BadRows(), lambda _: None)


def chat_of(tiny: Path) -> ChatTemplate:
    return ChatTemplate.from_dir(tiny, Tokenizer.from_dir(tiny))


def test_windows_are_the_scripts(tiny: Path) -> None:
    chat = chat_of(tiny)
    added = chat.tokenizer.added_tokens
    im_end, think_end = added["<|im_end|>"], added["</think>"]
    for reply in (PLAIN, THINKING):
        ids = chat.render([USER, reply]).token_ids
        (whole,) = laid_out(tiny, row(USER, reply))
        (answer,) = laid_out(tiny, row(USER, reply), thinking=False)
        # The script without --thinking: behind </think> and the token of two newlines, to the very end.
        assert answer.start == ids.index(think_end) + 2
        assert whole.token_ids == answer.token_ids == ids
        if reply is THINKING:  # with it: four behind "assistant"
            header = ids.index(added["<|im_start|>"], 1) + 1
            assert whole.start == header + 4
        else:
            assert whole.start == answer.start
        assert ids[whole.start + whole.num_reply_labels - 1] == im_end
        assert (
            whole.start + whole.num_reply_labels == len(ids) - 1
        )  # the newline is in the window, not the reply
    (prompt,) = laid_out(tiny, row(USER, PLAIN), target="prompt")
    assert prompt.token_ids[prompt.start] == prompt.token_ids[-1] == im_end
    assert prompt.num_reply_labels == 1


def test_outcomes_are_those_of_moderate(tiny: Path) -> None:
    """From one forward under feeds of its own: what `moderate_many` says, and on the newline behind."""
    rows = [row(USER, PLAIN), row(USER, THINKING), row(USER)]
    with Engine.from_pretrained(tiny, kv_cache_bytes=2**22, max_model_len=512) as engine:
        outcomes = judge_stream(engine, laid_out(tiny, *rows), lambda _: None)
        for found in outcomes:
            for rule in ("report", "eval-compat"):
                for mode, policy in (("strict", Policy.strict), ("loose", Policy.loose)):
                    moderation = engine.moderate(found.row.messages, policy(rule=rule))
                    verdict = moderation.response
                    if verdict is None:  # ends with the user
                        verdict = policy(rule=rule).judge([moderation.prompt])
                    if rule == "report" or found.target == "prompt":
                        call = found.calls[rule, mode]
                        assert (call.is_unsafe, call.position) == (
                            verdict.action != "allow",
                            verdict.position,
                        )
            if found.target == "response":
                labels = moderation.labels
                best = max(
                    min(1 - a.risk_probs["Safe"], 1 - b.risk_probs["Safe"]) for a, b in pairwise(labels)
                )
                assert found.scores["strict"] == pytest.approx(best, abs=1e-6)
        engine.check_integrity()
    assert [found.target for found in outcomes] == ["response", "response", "prompt"]


def test_each_conversation_runs_once(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fed: list[int] = []
    run_feeds = predict.run_feeds
    monkeypatch.setattr(
        predict,
        "run_feeds",
        lambda core, feeds, policy: (
            fed.extend(len(f.token_ids) for f in feeds) or run_feeds(core, feeds, policy)
        ),
    )
    file = write(tmp_path / "a.jsonl", record(USER, PLAIN), record(USER, label="Safe"))
    report = evaluate([file], tiny, num_threads=1)
    assert len(fed) == 2
    assert [(each.target, each.num_rows) for each in report.sections] == [("response", 1), ("prompt", 1)]


def test_spans_are_counted_in_the_conversations_tokens(tiny: Path, tmp_path: Path) -> None:
    (judged,) = laid_out(tiny, row(USER, PLAIN))
    span = {"unsafe_start_index": judged.start, "unsafe_end_index": judged.start + 2}
    file = write(
        tmp_path / "a.jsonl",
        record(USER, PLAIN, **span, input_ids=judged.token_ids),
        record(USER, PLAIN, **span, input_ids=[1]),
        record(USER, PLAIN),
        record(USER, PLAIN, label="Safe"),
    )
    with Engine.from_pretrained(tiny, kv_cache_bytes=2**22, max_model_len=512) as engine:
        (found,) = judge_stream(engine, [judged], lambda _: None)
    (section,) = evaluate([file], tiny, num_threads=1).sections
    assert (section.num_rows, section.num_unsafe) == (4, 3)
    assert (section.num_without_span, section.num_other_ids) == (1, 1)
    for result in section.rules:
        assert result.latency is not None
        expected = Detection(found.calls[result.rule, result.mode].position, judged.start, judged.start + 2)
        assert result.latency.bins[expected.bin] == 2


def test_rows_that_cannot_be_judged(tiny: Path, tmp_path: Path) -> None:
    bad = [
        ({"role": "assistant", "content": "no prompt"},),
        (USER, {"role": "assistant", "content": 3}),
        (USER, {"role": "assistant", "content": "<think>a</think>dropped<think>b</think>c"}),
    ]
    for messages in bad:
        with pytest.raises(InvalidText, match=r"^a\.jsonl, line 1: "):
            laid_out(tiny, row(*messages))
    with pytest.raises(InvalidText, match="--target response"):
        laid_out(tiny, row(USER), target="response")
    long = row(USER, {"role": "assistant", "content": "word " * 200})
    with pytest.raises(StreamTooLong, match=r"^a\.jsonl, line 1: "):
        laid_out(tiny, long, limit=100)
    bad_rows = BadRows(allowed=1)
    assert len(laid_out(tiny, long, row(USER), bad_rows=bad_rows, limit=100)) == 1
    assert len(bad_rows.reasons) == 1


# -- Gen ---------------------------------------------------------------------------------------------------


class FakeGen:
    """Answers by the last message's text, and refuses what says "refuse"."""

    def __init__(self) -> None:
        self.asked: list[list[Any]] = []

    def moderate_many(
        self, conversations: Any, policy: Policy | None = None, *, on_unfit: str = "raise"
    ) -> list[GenModeration | StreamTooLong]:
        self.asked.append(list(conversations))
        assert on_unfit == "return"
        return [
            StreamTooLong("too long") if "refuse" in messages[-1]["content"] else self.answer(messages[-1])
            for messages in conversations
        ]

    def answer(self, message: dict[str, str]) -> GenModeration:
        safety = next(
            (s for s in ("Unsafe", "Controversial", "Safe") if s in message["content"]), "Unparsable"
        )
        return GenModeration(
            role="user" if message["role"] == "user" else "assistant",
            safety=safety,
            categories=(),
            refusal=None if message["role"] == "user" else "No",
            safety_probs={},
            category_probs={},
            refusal_probs={},
            text="",
            verdict=Verdict("allow", "Safe", None, None, "none", 0),
            num_prompt_tokens=1,
            num_answer_tokens=1,
        )

    def stats(self) -> dict[str, Any]:
        return {
            "backend": "cpu",
            "isa": None,
            "dtype": "float32",
            "quantization": None,
            "num_threads": 1,
            "version": "x",
        }

    def __enter__(self) -> FakeGen:
        return self

    def __exit__(self, *_: Any) -> None:
        pass


def says(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_gen_is_asked_about_what_is_judged() -> None:
    rows = [
        row(USER, says("<think>\nUnsafe thoughts\n</think>\n\nSafe words")),
        row(USER, {**says("Safe words"), "reasoning_content": "Controversial thoughts"}),
        row({"role": "user", "content": "Unsafe"}),
    ]

    def safeties(**aim: Any) -> list[str]:
        engine = FakeGen()
        outcomes = judge_gen(engine, rows, Aim(**aim), BadRows(), lambda _: None)
        assert len(engine.asked) == 1  # one call
        calls = [
            (o.calls["answer", "strict"].is_unsafe, o.calls["answer", "loose"].is_unsafe) for o in outcomes
        ]
        return ["SCU"[strict + loose] for strict, loose in calls]

    assert safeties() == ["U", "C", "U"]
    assert safeties(thinking=False) == ["S", "S", "U"]
    assert safeties(target="prompt") == ["U", "U", "U"]  # bread is unparsable, which is unsafe


def test_gen_rows_that_the_engine_refuses_are_bad_and_the_others_are_judged() -> None:
    rows = [row(USER, says(f"Safe {i}" if i != 5 else "refuse")) for i in range(20)]
    bad_rows = BadRows(allowed=1)
    outcomes = judge_gen(FakeGen(), rows, Aim(), bad_rows, lambda _: None)
    assert [found.row for found in outcomes] == [each for i, each in enumerate(rows) if i != 5]
    assert bad_rows.reasons == ["a.jsonl, line 1: too long"]
    with pytest.raises(StreamTooLong, match=r"^a\.jsonl, line 1: too long"):
        judge_gen(FakeGen(), rows, Aim(), BadRows(), lambda _: None)


# -- the command -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("data")
    span = {"unsafe_start_index": 20, "unsafe_end_index": 24}
    return [
        write(
            folder / "thinking.jsonl",
            *(record(USER, THINKING if i % 2 else PLAIN, label=("Safe", "Unsafe")[i < 2]) for i in range(5)),
        ),
        write(folder / "response_loc.jsonl", record(USER, PLAIN, **span), record(USER, THINKING, **span)),
    ]


def test_the_command(
    tiny: Path, data: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    arguments = ["evaluate", *map(str, data), "--checkpoint", str(tiny), "--threads", "1"]
    assert main([*arguments, "--json", str(tmp_path / "o.json"), "--plots", str(tmp_path / "plots")]) == 0
    printed = capsys.readouterr()
    record = json.loads((tmp_path / "o.json").read_text())
    assert [(s["num_rows"], s["num_unsafe"]) for s in record["sections"]] == [(5, 2), (2, 2)]
    strict = record["sections"][0]["rules"][0]
    assert f"| report      | strict | {strict['f1']:.4f} | " in printed.out
    assert printed.out.count("| exact hit | within 128 |") == 1
    assert "moderating: 100%" in printed.err
    pictures = {path.name: path.read_bytes()[:4] for path in (tmp_path / "plots").iterdir()}
    assert pictures == {
        f"{name}.png": b"\x89PNG"
        for name in (
            "thinking-response-calibration",
            "thinking-response-roc",
            "response_loc-response-calibration",
            "response_loc-response-latency",
        )
    }


def test_the_commands_rules_and_bad_rows(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "a.jsonl", record(USER, PLAIN), "{", record(says("no prompt")))
    arguments = ["evaluate", str(file), "--checkpoint", str(tiny), "--threads", "1", "--rule", "eval-compat"]
    assert main(arguments) == 2
    assert f"{file}, line 2: not JSON" in capsys.readouterr().err
    assert main([*arguments, "--allow-bad-rows", "1"]) == 2
    assert f"{file}, line 3: " in capsys.readouterr().err
    assert main([*arguments, "--allow-bad-rows", "2", "--no-thinking"]) == 0
    printed = capsys.readouterr().out
    assert "Bad rows, left out: 2" in printed
    assert "| eval-compat | strict |" in printed
    assert "| report" not in printed
    assert "without their reasoning" in printed
    assert main([*arguments, "--max-rows", "1"]) == 0


def test_the_command_with_a_gen_checkpoint(
    checkpoints: Callable[..., Path],
    data: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(evaluating.Engine, "from_pretrained", lambda *_, **__: FakeGen())
    folder = checkpoints("gen-tiny", vocab_size=512)
    assert main(["evaluate", *map(str, data), "--checkpoint", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "a Gen checkpoint" in printed
    assert "| answer | strict | 0.5714 | " in printed  # all are unparsable: 2 of 5 hits
    assert "5 answers unparsable, counted as unsafe" in printed
    assert "exact hit" not in printed  # one answer for a whole response


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rules": ("magic",)}, "rules="),
        ({"rules": ()}, "rules="),
        ({"allow_bad_rows": -1}, "allow_bad_rows=-1"),
        ({"max_rows": 0}, "max_rows=0"),
    ],
)
def test_bad_options(tmp_path: Path, options: dict[str, Any], says: str) -> None:
    file = write(tmp_path / "a.jsonl", record(USER))
    with pytest.raises(ConfigError, match=says):
        evaluate([file], tmp_path, **options)
    with pytest.raises(ConfigError, match="each once"):
        evaluate([file, file], tmp_path)
