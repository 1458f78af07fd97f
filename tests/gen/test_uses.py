"""A real Gen checkpoint behind what others made for answers: annotation, evaluation, rewards, the server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from guardengine import Engine
from guardengine.cli import main
from guardengine.rewards import GuardReward

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(checkpoints) -> Path:
    return checkpoints("gen-tiny", dtype="float32")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    talks = [
        {
            "messages": [
                {"role": "user", "content": f"question {i}"},
                {"role": "assistant", "content": "answer " * (i + 1)},
            ],
            "label": ("Safe", "Unsafe")[i % 2],
        }
        for i in range(4)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in talks))
    return file


def test_annotate(folder: Path, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    assert main(["annotate", str(rows), str(out), "--checkpoint", str(folder)]) == 0
    given = [json.loads(line) for line in rows.read_text().splitlines()]
    with Engine.from_pretrained(folder) as engine:
        answers = engine.moderate_many([row["messages"] for row in given])
    for line, row, answer in zip(out.read_text().splitlines(), given, answers, strict=True):
        found = json.loads(line)
        assert {key: found[key] for key in row} == row
        assert (found["guard_risk"], found["guard_scores"]) == (
            answer.safety,
            pytest.approx(answer.safety_probs),
        )
        assert found["guard_first_flag_token"] is None


def test_evaluate(folder: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = tmp_path / "numbers.json"
    assert main(["evaluate", str(rows), "--checkpoint", str(folder), "--json", str(record)]) == 0
    assert "a Gen checkpoint" in capsys.readouterr().out
    assert json.loads(record.read_text())


def test_rewards(folder: Path) -> None:
    prompts = ["How do I bake?", "x"]
    completions = ["Mix.", "<think>\nhm\n</think>\n\nok"]
    with Engine.from_pretrained(folder) as engine:
        plain = GuardReward(engine)(prompts, completions)
        hybrid = GuardReward(engine, "hybrid", preference=lambda pairs: [3.0] * len(pairs))(
            prompts, completions
        )
        answer = engine.moderate(
            [{"role": "user", "content": "How do I bake?"}, {"role": "assistant", "content": "Mix."}]
        )
    assert (plain[0].output, plain[0].value) == (answer.safety, float(answer.safety == "Safe"))
    assert plain[1].thinking is not None
    for reward in hybrid:
        is_unsafe = {reward.thinking, reward.output} & {"Unsafe", "Controversial"}
        assert reward.value == (-10 if is_unsafe else -5 if reward.is_refusal else 3)
