"""verify-quantization: its numbers against a direct computation, what it reads, and when it fails."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from guardengine import Engine, Policy
from guardengine.checkpoint.model_config import ModelConfig
from guardengine.cli import main
from guardengine.errors import CheckpointError, ConfigError, InvalidText
from guardengine.labels import Label
from guardengine.verify import quantization as verify
from guardengine.verify.corpus import CONVERSATIONS, load_corpus, read_conversations
from guardengine.verify.quantization import SCHEMES, Report, verify_quantization
from guardengine.verify.report import markdown

pytestmark = pytest.mark.slow

CHAT = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi, what can I do for you?"}]


@pytest.fixture(scope="module")
def small(checkpoints: Callable[..., Path]) -> Path:
    """bf16, no tokenizer: random ids."""
    return checkpoints(vocab_size=512)


@pytest.fixture(scope="module")
def text(checkpoints: Callable[..., Path]) -> Path:
    folder = checkpoints()
    if not (folder / "tokenizer.json").exists():
        pytest.skip("no Qwen vocabulary at hand")
    return folder


@pytest.fixture(scope="module")
def report(small: Path) -> Report:
    return verify_quantization(small)


def test_numbers_are_those_of_a_direct_computation(small: Path, report: Report) -> None:
    config = ModelConfig.from_dict(json.loads((small / "config.json").read_text()))
    corpus = load_corpus(small, config)
    assert report.corpus == "random token ids"
    assert report.num_conversations == len(corpus.feeds)
    assert report.num_tokens == sum(len(feed.token_ids) for feed in corpus.feeds)

    def run(**options: Any) -> list[list[Label]]:
        """One stream at a time, the prompt first, then the reply: not how the report does it."""
        found = []
        with Engine.from_pretrained(small, kv_cache_bytes=2**22, **options) as engine:
            for feed in corpus.feeds:
                prompt_end = feed.wanted[0].position + 1
                with engine.open(token_ids=feed.token_ids[:prompt_end]) as stream:
                    labels = engine.run()
                    stream.append(feed.token_ids[prompt_end:])
                    found.append(labels + engine.run())
        return found

    standard, other = run(dtype="float32"), run(quantization="w8a8", kv_dtype="int8")
    (scheme,) = [scheme for scheme in report.schemes if scheme.scheme == "w8a8+kv-int8"]
    for role in ("user", "assistant"):
        pairs = [
            (a, b)
            for before, after in zip(standard, other, strict=True)
            for a, b in zip(before, after, strict=True)
            if a.role == role
        ]
        errors = scheme.roles[role]
        assert errors.num_labels == len(pairs)
        distances = np.concatenate(
            [
                np.abs(np.concatenate((a.risk_logits - b.risk_logits, a.category_logits - b.category_logits)))
                for a, b in pairs
            ]
        )
        assert errors.max_logit_error == pytest.approx(distances.max(), rel=1e-5)
        assert errors.mean_logit_error == pytest.approx(distances.mean(), rel=1e-5)
        assert errors.max_probability_error == pytest.approx(
            max(
                abs(p[name] - q[name])
                for a, b in pairs
                for p, q in ((a.risk_probs, b.risk_probs), (a.category_probs, b.category_probs))
                for name in p
            ),
            rel=1e-4,
        )
        assert errors.risk_agreement == pytest.approx(np.mean([a.risk == b.risk for a, b in pairs]))
        not_safe = [(a, b) for a, b in pairs if a.risk != "Safe"]
        assert errors.num_not_safe == len(not_safe)
        assert errors.category_agreement == pytest.approx(
            np.mean([a.category == b.category for a, b in not_safe])
        )
        sure = [
            a.risk != b.risk
            for a, b in pairs
            if sorted(a.risk_probs.values())[-1] - sorted(a.risk_probs.values())[-2] >= 0.1
        ]
        assert (errors.flips[-1].num_labels, errors.flips[-1].num_flipped) == (len(sure), sum(sure))
        assert errors.num_flipped == sum(a.risk != b.risk for a, b in pairs)
    policy = Policy.strict()
    verdicts = [[policy.judge(labels) for labels in found] for found in (standard, other)]
    assert scheme.verdicts.num_any == sum(a != b for a, b in zip(*verdicts, strict=True))
    assert scheme.verdicts.num_actions == sum(a.action != b.action for a, b in zip(*verdicts, strict=True))


def test_every_scheme_is_run_and_shown(report: Report) -> None:
    assert [scheme.scheme for scheme in report.schemes] == list(SCHEMES)
    assert report.own_dtype is not None
    assert report.own_dtype.scheme == "bfloat16"
    shown = markdown(report)
    for name in ("bfloat16", *SCHEMES):
        rows = [line for line in shown.splitlines() if line.startswith("|") and line.split()[1] == name]
        assert len(rows) == 5, name  # two rows in two tables, one of verdicts
    assert "real checkpoint" in shown
    w8a8 = report.schemes[1]
    assert report.relative(w8a8, "assistant")["mean_logit_error"] == pytest.approx(
        w8a8.roles["assistant"].mean_logit_error / report.own_dtype.roles["assistant"].mean_logit_error  # type: ignore[operator]
    )


def test_a_float32_checkpoint_has_no_dtype_of_its_own_to_compare_with(tiny: Path) -> None:
    report = verify_quantization(tiny, schemes=["int8"], max_tokens=200, backend="reference")
    assert report.own_dtype is None
    assert report.engine["backend"] == "reference"
    assert set(report.relative(report.schemes[0], "user").values()) == {None}
    assert (report.num_conversations, report.num_left_out) == (2, 22)
    assert "22 left out" in markdown(report)
    json.dumps(report.as_json(), allow_nan=False)


def test_one_engine_at_a_time(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_engines, most = 0, 0
    load, close = Engine.from_pretrained, Engine.close

    def counted_load(*args: Any, **options: Any) -> Engine:
        nonlocal open_engines, most
        open_engines += 1
        most = max(most, open_engines)
        return load(*args, **options)

    def counted_close(engine: Engine) -> None:
        nonlocal open_engines
        open_engines -= 1
        close(engine)

    monkeypatch.setattr(Engine, "from_pretrained", counted_load)
    monkeypatch.setattr(Engine, "close", counted_close)
    verify_quantization(small, schemes=["int8", "w8a8"], max_tokens=100)
    assert (open_engines, most) == (0, 1)


def test_broken_weights_are_no_standard(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = verify._run

    def broken(*args: Any) -> Any:
        run = runs(*args)
        run.logits["user"].risk[0, 0] = float("nan")
        return run

    monkeypatch.setattr(verify, "_run", broken)
    with pytest.raises(CheckpointError, match="not finite in float32"):
        verify_quantization(small, schemes=["int8"], max_tokens=100)


# What is read


def test_json_lines_and_prompts_are_read(tmp_path: Path) -> None:
    file = tmp_path / "corpus.txt"
    file.write_text(
        "\ufeffHow are you?\n\n" + json.dumps({"messages": CHAT, "id": 3}) + "\n  你好\u2028吗 \r\n",
        encoding="utf-8",
    )
    found = read_conversations(file)
    assert [messages for _, messages in found] == [
        [{"role": "user", "content": "How are you?"}],
        CHAT,
        [{"role": "user", "content": "你好\u2028吗"}],
    ]
    assert [where.rpartition(", ")[2] for where, _ in found] == ["line 1", "line 3", "line 4"]


@pytest.mark.parametrize(
    ("line", "pattern"),
    [
        ('{"messages": [', r"line 2 begins like JSON but is not .*one object a line"),
        ('{"message": "Hi"}', r'line 2: "messages" is None; it must be a list'),
        ('{"messages": []}', r'line 2: "messages" is \[\]; it must be a list'),
        ('{"messages": "Hi"}', r'line 2: "messages" is Hi; it must be a list'),
        ('{"messages": [{"role": "robot", "content": "Hi"}]}', r"line 2: .*robot"),
        ('{"messages": [3]}', r"line 2: messages\[0\]"),
    ],
)
def test_bad_lines_are_named(text: Path, tmp_path: Path, line: str, pattern: str) -> None:
    file = tmp_path / "corpus.jsonl"
    file.write_text(f"Hello\n{line}\n")
    with pytest.raises(InvalidText, match=pattern):
        verify_quantization(text, file=file)


@pytest.mark.slow
def test_a_file_is_run_with_its_text(text: Path, tmp_path: Path) -> None:
    file = tmp_path / "corpus.jsonl"
    file.write_text("Hello\n" + json.dumps({"messages": CHAT}) + "\n")
    report = verify_quantization(text, schemes=["int8"], file=file)
    assert report.corpus == str(file)
    with Engine.from_pretrained(text, kv_cache_bytes=2**22) as engine:
        labels = len(engine.moderate(CHAT).labels)
    assert report.schemes[0].roles["user"].num_labels == 2
    assert report.schemes[0].roles["assistant"].num_labels == labels
    assert report.schemes[0].verdicts.num_conversations == 2


@pytest.mark.slow
def test_prompts_alone_have_no_response_rows(text: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("Hello\nGood morning\n")
    report = verify_quantization(text, schemes=["w8a8"], file=file)
    assert report.schemes[0].roles["assistant"].num_labels == 0
    assert report.schemes[0].roles["assistant"].risk_agreement is None
    assert 0 <= report.risk_agreement <= 1
    assert " response |" not in markdown(report)


def test_built_in_conversations_are_readable_by_the_template(text: Path) -> None:
    config = ModelConfig.from_dict(json.loads((text / "config.json").read_text()))
    corpus = load_corpus(text, config)
    assert len(corpus.feeds) == len(CONVERSATIONS)
    assert all(len({wanted.role for wanted in feed.wanted}) == 2 for feed in corpus.feeds)
    assert corpus.num_tokens < 2000  # a run on two cores stays at minutes


# Refusals


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"schemes": ["int4"]}, r"unknown scheme 'int4'; the schemes are int8, w8a8"),
        ({"schemes": []}, "one or more of int8"),
        ({"schemes": "int8"}, "a list"),
        ({"schemes": ["int8", "int8"]}, "named twice"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"max_tokens": 5}, r"max_tokens=5: the shortest conversation has 80 tokens; raise it"),
        ({"file": Path("x.txt")}, r"x\.txt is text, and .* has no tokenizer\.json"),
        ({"backend": "tpu"}, "backend='tpu'"),
    ],
)
def test_bad_options_are_refused(small: Path, options: dict[str, Any], pattern: str) -> None:
    with pytest.raises(ConfigError, match=pattern):
        verify_quantization(small, **options)


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n\n")
    (tmp_path / "latin").write_bytes(b"caf\xe9\n")
    for name, pattern in (
        ("missing", "cannot be read"),
        ("latin", "cannot be read"),
        ("empty", "no conversations"),
    ):
        with pytest.raises(ConfigError, match=pattern):
            read_conversations(tmp_path / name)


def test_a_gen_checkpoint_is_refused(checkpoints: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match="no guard heads"):
        verify_quantization(checkpoints("gen-tiny", vocab_size=512))


# The command


def test_the_command_prints_and_writes(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "report.json"
    arguments = ["--schemes", "int8,kv-int8", "--max-tokens", "400", "--json", str(file)]
    assert main(["verify-quantization", str(small), *arguments]) == 0
    out = capsys.readouterr().out
    assert "kv-int8" in out
    assert "w8a8" not in out
    record = json.loads(file.read_text())
    assert [scheme["scheme"] for scheme in record["schemes"]] == ["int8", "kv-int8"]
    assert record["schemes"][0]["relative_to_own_dtype"]["user"]["mean_logit_error"] > 0
    assert record["schemes"][0]["roles"]["assistant"]["flips"][0]["num_labels"] >= 0
    assert record["machine"]["cores"] >= 1


def test_fail_below_sets_the_exit_status(
    small: Path, report: Report, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report.risk_agreement < 1.0  # or this test could not fail
    command = ["verify-quantization", str(small), "--fail-below"]
    assert main([*command, "1"]) == 1
    assert "fewer than --fail-below 100.00%" in capsys.readouterr().err
    assert main([*command, str(report.risk_agreement)]) == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["--schemes", "int8,int4"],
        ["--fail-below", "90"],
        ["--json", "/nowhere/report.json"],
        ["--input", "/nowhere/file"],
    ],
)
def test_wrong_options_exit_with_2(
    small: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify-quantization", str(small), *arguments]) == 2
    assert "guardengine: " in capsys.readouterr().err


def test_a_missing_checkpoint_exits_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify-quantization", str(tmp_path / "nothing")]) == 2
    assert "nothing" in capsys.readouterr().err
