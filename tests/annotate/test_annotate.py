"""guardengine annotate: what is written for a row, by Stream and Gen; the columns, and the command."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from annotating import (
    GUARD,
    FakeGen,
    checkpoint_folder,
    guard_values,
    open_engine,
    read_lines,
    run,
    write_lines,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from guardengine import ConfigError, Engine, Label, Policy
from guardengine.annotate.annotations import scored_label
from guardengine.annotate.layout import Layout
from guardengine.annotate.response_chars import ResponseChars
from guardengine.cli import main
from guardengine.text.chat_template import ChatTemplate
from guardengine.text.tokenizer import Tokenizer

pytestmark = pytest.mark.slow

TEXTS = [
    "The capital is Paris (巴黎是法国的首都), n'est-ce pas?",
    "caf\u0301e\u0301 na\u0308ive, decomposed",
    "👩‍👩‍👧 It's done. " * 3,
    "one two three four five six seven",
    "def f(x):\n    return x  # 数\n\n",
    "  two spaces first",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 and ﬁ and Å",
]


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Iterator[Engine]:
    yield from open_engine(checkpoint)


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> Tokenizer:
    return Tokenizer.from_dir(checkpoint)


@pytest.fixture(scope="module")
def chars(checkpoint: Path) -> ResponseChars:
    return ResponseChars(checkpoint)


@pytest.fixture
def fake(tmp_path: Path) -> Path:
    return checkpoint_folder(tmp_path / "fake")


# -- what is written ---------------------------------------------------------------------------------------


def test_rows_keep_their_order_and_columns_and_get_the_engines_verdicts(
    engine: Engine, checkpoint: Path, tmp_path: Path
) -> None:
    rows = [
        {
            "id": i,
            "prompt": f"Is {i} it?" * (1 + i % 5),
            "response": TEXTS[i % len(TEXTS)] * (1 + i % 3),
            "x": 1.5,
        }
        for i in range(40)
    ]
    source = write_lines(tmp_path / "in.jsonl", rows)
    report = run(source, tmp_path / "out.jsonl", checkpoint, engine, window_rows=16)
    lines = (tmp_path / "out.jsonl").read_bytes().splitlines()
    assert report.num_rows == len(lines) == len(rows)
    num_flagged = 0
    for row, line, before in zip(rows, lines, source.read_bytes().splitlines(), strict=True):
        assert line.startswith(before[:-1])
        found = json.loads(line)
        assert list(found) == [*row, *GUARD]
        messages = [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["response"]},
        ]
        expected = engine.moderate(messages)
        assert found["guard_risk"] == expected.response.risk
        assert found["guard_category"] == expected.response.category
        assert found["guard_scores"] in [label.risk_probs for label in expected.labels]
        token, char = found["guard_first_flag_token"], found["guard_first_flag_char"]
        assert (token is None) == (char is None) == (expected.response.action == "allow")
        if token is not None:
            num_flagged += 1
            policy = Policy.strict()
            assert all(policy.hit(label) for label in expected.labels[token : token + 2])
            assert token == expected.response.cleared
            assert all(
                not (policy.hit(one) and policy.hit(two))
                for one, two in zip(expected.labels[:token], expected.labels[1 : token + 1], strict=True)
            )
    assert 3 < num_flagged < len(rows)
    assert report.num_tokens > 500
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_characters_are_those_that_a_stream_reports(engine: Engine, chars: ResponseChars) -> None:
    for text in TEXTS:
        with engine.open(messages=[{"role": "user", "content": "?"}]) as stream:
            stream.append_text(text)
            stream.finish_text()
            engine.run()
            *labels, end = stream.labels
            ids = [label.token_id for label in labels]
            assert len(ids) > 3
            assert stream.span(end).start_char == len(text)
            for index, label in enumerate(labels):
                assert chars.start_of(text, ids, index) == stream.span(label).start_char
            assert chars.start_of(text, ids, len(ids)) == len(text)


@pytest.mark.parametrize(
    ("text", "reasoning"),
    [
        ("\n\nAfter newlines, 世界.", None),
        (" \n spaces and newlines joined to the template's", None),
        ("\n \ncafe\u0301 \u00e9 joined and decomposed", None),
        ("<think>\nFirst this, then that.\n</think>\n\nThe answer.", None),
        ("The answer alone.", "Apart: this, then that."),
    ],
)
def test_characters_are_found_where_the_template_changes_the_text(
    checkpoint: Path, tokenizer: Tokenizer, chars: ResponseChars, text: str, reasoning: str | None
) -> None:
    message = {"role": "assistant", "content": text}
    if reasoning is not None:
        message["reasoning_content"] = reasoning
    rendered = ChatTemplate.from_dir(checkpoint, tokenizer).render(
        [{"role": "user", "content": "?"}, message]
    )
    ids = rendered.token_ids[rendered.response_start : rendered.response_end - 1]
    starts = [chars.start_of(text, ids, index) for index in range(len(ids) + 1)]
    assert starts[-1] == len(text)
    own = [start for start in starts if start is not None]
    assert own == sorted(own)
    assert (len(own) < len(starts)) == (reasoning is not None)
    # Every word's first letter is where its token says.
    for index, token_id in enumerate(ids):
        word = tokenizer.decode([token_id]).strip()
        if (
            word.isascii()
            and len(word) > 2
            and word.isalpha()
            and starts[index] is not None
            and word != "think"
        ):
            assert text[starts[index] :].lstrip().startswith(word)


@given(
    unsafe=st.lists(st.floats(0, 1), min_size=1, max_size=12),
    debounce=st.integers(1, 4),
)
@settings(deadline=None)
def test_the_score_is_the_highest_threshold_that_flags(unsafe: list[float], debounce: int) -> None:
    labels = [
        Label(
            "s", "assistant", i, 0, "", "", {"Safe": 1 - p, "Unsafe": p}, {}, *[np.zeros(1, np.float32)] * 2
        )
        for i, p in enumerate(unsafe)
    ]
    score = scored_label(labels, Policy(debounce=debounce, safe_risks=("Safe",))).risk_probs["Unsafe"]
    width = min(debounce, len(unsafe))

    def flags(threshold: float) -> bool:
        return any(
            all(p >= threshold for p in unsafe[start : start + width])
            for start in range(len(unsafe) - width + 1)
        )

    assert flags(score)
    assert not flags(np.nextafter(score, 2))


@pytest.mark.parametrize("policy", ["strict", "loose"])
def test_prompts_are_judged_alone_where_nothing_else_is_named(
    engine: Engine, checkpoint: Path, tmp_path: Path, policy: str
) -> None:
    rows = [{"prompt": f"Prompt {'na ' * i}{i}", "response": "Yes."} for i in range(12)]
    source = write_lines(tmp_path / "in.jsonl", rows)
    run(source, tmp_path / "out.jsonl", checkpoint, engine, layout=Layout(prompt="prompt"), policy=policy)
    make = Policy.strict if policy == "strict" else Policy.loose
    for row, found in zip(rows, read_lines(tmp_path / "out.jsonl"), strict=True):
        label = engine.moderate([{"role": "user", "content": row["prompt"]}]).prompt
        risk = make().hit(label)
        assert guard_values(found) == [
            risk or "Safe",
            label.category if risk else None,
            label.risk_probs,
            None,
            None,
        ]


def test_messages_are_judged_by_their_last(engine: Engine, checkpoint: Path, tmp_path: Path) -> None:
    user, reply = {"role": "user", "content": "Hello?"}, {"role": "assistant", "content": TEXTS[0], "n": 3}
    rows = [
        {"messages": [user], "prompt": "not this"},
        {"messages": [{"role": "system", "content": "Brief."}, user, reply]},
    ]
    source = write_lines(tmp_path / "in.jsonl", rows)
    report = run(source, tmp_path / "out.jsonl", checkpoint, engine)
    prompt, response = read_lines(tmp_path / "out.jsonl")
    assert str(report.layout) == "messages in 'messages'"
    assert prompt["guard_scores"] == engine.moderate([user]).prompt.risk_probs
    del reply["n"]
    expected = engine.moderate(rows[1]["messages"])
    assert response["guard_risk"] == expected.response.risk
    assert response["guard_scores"] == scored_label(expected.labels, Policy.strict()).risk_probs


@pytest.mark.slow
def test_a_gen_checkpoint(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    rows = [{"prompt": f"Prompt {i}", "response": TEXTS[i]} for i in range(4)] + [{"prompt": "x"}]
    source, out, checkpoint = (
        write_lines(tmp_path / "in.jsonl", rows),
        tmp_path / "out.jsonl",
        checkpoints("gen-tiny"),
    )
    with Engine.from_pretrained(checkpoint, kv_cache_bytes=2**23, num_threads=1) as gen:
        report = run(source, out, checkpoint, gen)
        expected = [
            gen.moderate(
                [
                    {"role": "user", "content": row["prompt"]},
                    {"role": "assistant", "content": row["response"]},
                ]
            )
            for row in rows[:4]
        ]
    assert (report.num_rows, report.num_bad) == (5, 1)
    for row, answer in zip(read_lines(out)[:4], expected, strict=True):
        assert row["guard_scores"] == pytest.approx(answer.safety_probs)
        assert row["guard_risk"] == answer.verdict.risk
        if answer.verdict.risk != "Safe":
            assert row["guard_category"] == ", ".join(answer.categories)


def test_gen_answers(fake: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}"} for i in range(20)] + [{"prompt": "gibberish"}]
    source = write_lines(tmp_path / "in.jsonl", rows)
    gen = FakeGen()
    report = run(source, tmp_path / "out.jsonl", fake, gen, policy="loose")
    found = read_lines(tmp_path / "out.jsonl")
    answers = gen.moderate_many(
        [[{"role": "user", "content": row["prompt"]}] for row in rows], Policy.loose()
    )
    for row, answer in zip(found[:-1], answers, strict=False):
        is_hit = answer.safety == "Unsafe"
        assert guard_values(row) == [
            "Unsafe" if is_hit else "Safe",
            "Violent, PII" if is_hit else None,
            answer.safety_probs,
            None,
            None,
        ]
    assert guard_values(found[-1])[:3] == ["Unparsable", None, {}]
    assert report.risks["Unparsable"] == 1
    assert len(set(report.risks)) == 3


GOOD = {"prompt": "Good day", "response": "Good day to you"}

# -- options and the command -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "layout", "expected"),
    [
        ({"prompt": "a", "id": 1}, Layout(), Layout(prompt="prompt")),
        ({"question": "a", "answer": "b"}, Layout(), Layout(prompt="question", response="answer")),
        ({"question": "a", "rejected": "b"}, Layout(response="rejected"), Layout("question", "rejected")),
        ({"conversation": [{"role": "user", "content": "a"}]}, Layout(), Layout(messages="conversation")),
        ({"messages": "text", "prompt": "a"}, Layout(), Layout(prompt="prompt")),
        ({"q": "a", "r": "b"}, Layout(prompt="q"), Layout(prompt="q")),
        ({"q": "a"}, Layout(), "name it with --prompt-column"),
        ({"prompt": "a", "text": "b"}, Layout(), "'prompt', 'text' may each be the prompt"),
        ({"prompt": "a"}, Layout(prompt="p"), "no column 'p'; the columns are 'prompt'"),
        ({"prompt": "a"}, Layout(prompt="prompt", messages="m"), "leave out --prompt-column"),
        ({"prompt": "a", "guard_risk": 1}, Layout(), "choose another --prefix"),
    ],
)
def test_columns_are_found_or_named(
    fake: Path, tmp_path: Path, row: Any, layout: Layout, expected: Layout | str
) -> None:
    source = write_lines(tmp_path / "in.jsonl", [row])
    if isinstance(expected, Layout):
        assert run(source, tmp_path / "out.jsonl", fake, layout=layout).layout == expected
    else:
        with pytest.raises(ConfigError, match=expected):
            run(source, tmp_path / "out.jsonl", fake, layout=layout)


def test_limit_prefix_and_empty_inputs(fake: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", [{"prompt": str(i)} for i in range(10)])
    assert run(source, tmp_path / "out.jsonl", fake, limit=4, prefix="gen_").num_rows == 4
    found = read_lines(tmp_path / "out.jsonl")
    assert [row["prompt"] for row in found] == ["0", "1", "2", "3"]
    assert list(found[0])[1:] == [name.replace("guard_", "gen_") for name in GUARD]
    assert run(source, tmp_path / "none.jsonl", fake, limit=0).num_rows == 0
    assert (tmp_path / "none.jsonl").read_bytes() == b""
    with pytest.raises(ConfigError, match=r"must have rows|has no rows"):
        run(write_lines(tmp_path / "empty.jsonl", []), tmp_path / "out2.jsonl", fake)


def test_calls_hold_rows_of_like_length_and_long_ones_alone(fake: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "x" * (10 + 13 * (i % 7))} for i in range(2000)] + [{"prompt": "y" * 40_000}] * 2
    gen = FakeGen()
    run(write_lines(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl", fake, gen, window_rows=4096)
    assert sum(gen.calls) == len(rows)
    assert gen.calls.count(1) == 2
    assert max(gen.calls) > 200


def test_the_command(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_lines(tmp_path / "in.jsonl", [GOOD, {"prompt": "x"}, GOOD])
    arguments = ["annotate", str(source), str(tmp_path / "out.jsonl"), "--checkpoint", str(checkpoint)]
    arguments += ["--threads", "1", "--policy", "loose", "--quiet"]
    assert main(arguments) == 1
    printed = capsys.readouterr()
    assert "3 rows" in printed.out
    assert "1 rows were not judged" in printed.err
    assert main(arguments) == 2
    assert "--restart" in capsys.readouterr().err
    assert main([*arguments, "--restart", "--policy", "loose", "--debounce", "0"]) == 2
    assert main(["annotate", str(tmp_path / "no"), "x.jsonl", "--checkpoint", str(checkpoint)]) == 2
    assert "no such file or folder" in capsys.readouterr().err
