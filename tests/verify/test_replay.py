"""`guardengine replay`: a true log passes, cut off anywhere; a false one is found out, whatever line was changed."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from audit_logs import Lines, busy_log, nth, shifted, write

from guardengine import CheckpointError, ConfigError, GuardEngineError
from guardengine.cli import main
from guardengine.verify.replay import Report, replay

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def true_lines(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Lines:
    log = tmp_path_factory.mktemp("audit") / "true.jsonl"
    busy_log(tiny, log)
    return [json.loads(line) for line in log.read_bytes().splitlines()]


def check(folder: Path, path: Path, **options: Any) -> Report:
    return replay([path], folder, num_threads=1, **options)


# -- a true log passes -------------------------------------------------------------------------------------


def test_a_true_log_passes(
    tiny: Path, true_lines: Lines, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    events = {line["event"] for line in true_lines}
    assert events == {
        "start",
        "open",
        "tokens",
        "labels",
        "failure",
        "rollback",
        "fork",
        "restore",
        "close",
        "end",
    }
    path = write(tmp_path / "log", true_lines)
    assert main(["replay", str(path), "--checkpoint", str(tiny), "--threads", "1"]) == 0
    out = capsys.readouterr()
    logged = sum(len(line["labels"]) for line in true_lines if line["event"] == "labels")
    restored = sum(len(line["snapshot"]["labels"]) for line in true_lines if line["event"] == "restore")
    assert f"{logged + restored} labels compared bit for bit" in out.out
    assert "0 differences" in out.out
    assert "replaying" in out.err  # the bar
    assert check(tiny, path).num_streams == sum(
        line["event"] in ("open", "fork", "restore") for line in true_lines
    )


def test_a_log_cut_off_anywhere_passes(tiny: Path, true_lines: Lines, tmp_path: Path) -> None:
    """As a killed process leaves it: whole lines and a part of one."""
    path = tmp_path / "log"
    text = write(path, true_lines).read_bytes()
    ends = [match.end() for match in re.finditer(b"\n", text)]
    rng = random.Random(2)
    for end in [*rng.sample(ends, 12), *rng.sample(range(ends[0], len(text)), 12)]:
        path.write_bytes(text[:end])
        report = check(tiny, path)
        assert report.num_differences == 0, report.differences
        assert report.num_cut_lines == (text[end - 1] != ord("\n"))


def test_engines_that_followed_each_other_and_rotated_pieces(tiny: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    busy_log(tiny, log)
    log.write_bytes(log.read_bytes() + b'{"n":7,"ti')  # killed here
    busy_log(
        tiny, log, block_size=16, num_threads=2, prefix_caching=False, quantization="int8", dtype="bfloat16"
    )
    report = check(tiny, log)
    assert (report.num_differences, report.num_cut_lines, report.tolerance) == (0, 1, None)
    lines = log.read_bytes().splitlines(keepends=True)
    pieces = [tmp_path / "log.1", tmp_path / "log.2"]
    for piece, part in zip(pieces, (lines[:50], lines[50:]), strict=True):
        piece.write_bytes(b"".join(part))
    assert replay(pieces, tiny).num_labels == report.num_labels
    with pytest.raises(ConfigError, match="start line"):
        replay(pieces[::-1], tiny)


def test_without_ids_verdicts_are_checked(tiny: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    busy_log(tiny, log, audit_token_ids=False)
    report = check(tiny, log)
    assert (report.num_differences, report.num_tokens) == (0, 0)
    assert report.num_unchecked == report.num_labels > 0
    lines = [json.loads(line) for line in log.read_bytes().splitlines()]
    lines[nth(lines, "labels", has="verdict")]["verdict"]["risk"] = "Safe"
    assert [d.what for d in check(tiny, write(log, lines)).differences] == ["verdict"]


def test_another_backend_is_compared_within_a_tolerance(
    tiny: Path, true_lines: Lines, tmp_path: Path
) -> None:
    path = write(tmp_path / "log", true_lines)
    report = check(tiny, path, backend="reference")
    assert (report.num_differences, report.tolerance) == (0, 1e-3)
    assert check(tiny, path, backend="reference", tolerance=0).num_differences > 0
    row = true_lines[index := nth(true_lines, "labels")]["labels"][0]
    changed = [dict(line) for line in true_lines]
    changed[index] = {
        **changed[index],
        "labels": [[*row[:4], shifted(row[4], 0.01)], *changed[index]["labels"][1:]],
    }
    assert "logits" in [d.what for d in check(tiny, write(path, changed), backend="reference").differences]


# -- a false one is found out ------------------------------------------------------------------------------


def _logit(lines: Lines) -> None:
    row = lines[nth(lines, "labels")]["labels"][0]
    row[4] = shifted(row[4], 0)


def _logit_rolled_back(lines: Lines) -> None:
    """One of a label that a rollback dropped later on."""
    for cut in (line for line in lines if line["event"] == "rollback"):
        for line in lines[: lines.index(cut)][::-1]:
            if line["event"] == "labels" and line["stream"] == cut["stream"]:
                if line["labels"][-1][0] >= cut["tokens"]:
                    line["labels"][-1][4] = shifted(line["labels"][-1][4], 0)
                    return
                break
    raise AssertionError("no label was rolled back")


def _logit_restored(lines: Lines) -> None:
    row = lines[nth(lines, "restore")]["snapshot"]["labels"][-1]
    row[2] = shifted(row[2], 0)


def _verdict(lines: Lines) -> None:
    lines[nth(lines, "labels", has="verdict")]["verdict"]["category"] = "PII"


def _verdict_removed(lines: Lines) -> None:
    del lines[nth(lines, "labels", has="verdict")]["verdict"]


def _verdict_after_failure(lines: Lines) -> None:
    lines[nth(lines, "failure", has="verdict")]["verdict"]["action"] = "allow"


def _verdict_invented(lines: Lines) -> None:
    line = next(line for line in lines if line["event"] == "labels" and "verdict" not in line)
    line["verdict"] = {
        "action": "block",
        "risk": "Unsafe",
        "category": None,
        "position": 1,
        "rule": "debounce",
    }


def _cleared(lines: Lines) -> None:
    lines[nth(lines, "labels", 9)]["cleared"] += 1


def _label_removed(lines: Lines) -> None:
    line = next(line for line in lines if line["event"] == "labels" and len(line["labels"]) > 1)
    del line["labels"][0]


def _last_label_removed(lines: Lines) -> None:
    line = next(line for line in lines if line["event"] == "labels" and len(line["labels"]) > 1)
    del line["labels"][-1]


def _labels_line_removed(lines: Lines) -> None:
    del lines[nth(lines, "labels", 9)]


def _stream_removed(lines: Lines) -> None:
    lines[:] = [line for line in lines if line.get("stream") != "s1"]


def _label_invented(lines: Lines) -> None:
    line = lines[nth(lines, "labels", 5)]
    line["labels"].append(line["labels"][-1])


def _class(lines: Lines) -> None:
    row = lines[nth(lines, "labels")]["labels"][0]
    row[2] = "Safe" if row[2] != "Safe" else "Unsafe"


def _token(lines: Lines) -> None:
    ids = lines[nth(lines, "tokens", 2)]["ids"]
    ids[0] = (ids[0] + 1) % 512


def _tokens_line_removed(lines: Lines) -> None:
    del lines[nth(lines, "tokens", 12)]


def _failure_removed(lines: Lines) -> None:
    del lines[nth(lines, "failure", has="verdict")]


def _verdict_at_close(lines: Lines) -> None:
    line = next(line for line in lines if line["event"] == "close" and line["verdict"]["action"] == "block")
    line["verdict"]["action"] = "allow"


def _policy(lines: Lines) -> None:
    line = next(line for line in lines if line["event"] == "open" and line["policy"]["debounce"] == 2)
    line["policy"].update(safe_risks=["Safe", "Unsafe"], debounce=50)


def _classes(lines: Lines) -> None:
    lines[0]["classes"]["user"]["risks"].reverse()


def _closed(lines: Lines) -> None:
    lines[nth(lines, "close")]["labels"] -= 1


# fmt: off
TAMPERED: dict[Callable[[Lines], None], str] = {
    _logit: "logits", _logit_rolled_back: "logits", _logit_restored: "logits", _token: "logits",
    _verdict: "verdict", _verdict_removed: "verdict", _verdict_after_failure: "verdict",
    _verdict_invented: "verdict", _verdict_at_close: "verdict", _failure_removed: "verdict", _policy: "verdict",
    _label_removed: "label", _last_label_removed: "label", _labels_line_removed: "label",
    _label_invented: "label", _class: "classes", _classes: "classes", _closed: "labels at close",
    _cleared: "cleared", _tokens_line_removed: "tokens", _stream_removed: "line number",
}
# fmt: on


@pytest.mark.parametrize("tamper", TAMPERED, ids=lambda tamper: tamper.__name__.strip("_"))
def test_a_changed_line_is_found(tiny: Path, true_lines: Lines, tmp_path: Path, tamper: Any) -> None:
    lines = json.loads(json.dumps(true_lines))
    tamper(lines)
    renumbered = TAMPERED[tamper] != "line number"  # by somebody who knows what he does
    report = check(tiny, write(tmp_path / "log", lines, renumbered=renumbered))
    assert TAMPERED[tamper] in [difference.what for difference in report.differences]
    if tamper is _logit:
        ((line, stream, position, _, logged, replayed),) = report.differences
        index = nth(lines, "labels")
        assert (line, stream, position) == (index + 1, lines[index]["stream"], lines[index]["labels"][0][0])
        assert logged.rpartition(" ")[0] == replayed.rpartition(" ")[0]  # of the same class
        assert logged != replayed


def test_a_line_out_of_the_middle_is_missed(tiny: Path, true_lines: Lines, tmp_path: Path) -> None:
    for index in random.Random(3).sample(range(1, len(true_lines) - 1), 10):
        path = write(tmp_path / "log", true_lines[:index] + true_lines[index + 1 :])
        assert "line number" in [difference.what for difference in check(tiny, path).differences]


def test_a_label_missing_from_the_last_line_is_missed(tiny: Path, true_lines: Lines, tmp_path: Path) -> None:
    lines = json.loads(json.dumps(true_lines))
    index = next(i for i, line in enumerate(lines) if line["event"] == "labels" and len(line["labels"]) > 2)
    missed = lines[index]["labels"].pop()
    found = check(tiny, write(tmp_path / "log", lines[: index + 1])).differences
    assert [(d.line, d.position) for d in found if d.what == "label"] == [(index + 1, missed[0])]


def test_differences_are_printed_and_exit_with_1(
    tiny: Path, true_lines: Lines, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = json.loads(json.dumps(true_lines))
    for line in lines:
        for row in line.get("labels", []) if line["event"] == "labels" else []:
            row[4] = shifted(row[4], 0)
    path = write(tmp_path / "log", lines)
    arguments = ["replay", str(path), "--checkpoint", str(tiny), "--max-differences", "3"]
    assert main(arguments) == 1
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 5
    assert re.match(
        r"line \d+: 's\d' position \d+: logits: logged '[\w ]+ -?[\d.]+', replayed '[\w ]+ ", out[0]
    )
    assert re.match(r"\.\.\. and \d+ more", out[3])


# -- what cannot be told -----------------------------------------------------------------------------------


def test_what_cannot_be_compared_exits_with_2(
    checkpoints: Callable[..., Path],
    tiny: Path,
    true_lines: Lines,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write(tmp_path / "log", true_lines)
    other = checkpoints(vocab_size=512, dtype="float32", seed=1)
    empty = tmp_path / "empty"
    empty.touch()
    newer = write(tmp_path / "newer", [{**true_lines[0], "version": 2}])
    headless = write(tmp_path / "headless", true_lines[1:])
    for arguments, reason in (
        ([str(path), "--checkpoint", str(other)], "line 1.*weights"),
        ([str(empty), "--checkpoint", str(tiny)], "no start line"),
        ([str(headless), "--checkpoint", str(tiny)], "begin with a start line"),
        ([str(newer), "--checkpoint", str(tiny)], "line 1.*version=2"),
        ([str(tmp_path / "nothing"), "--checkpoint", str(tiny)], "no such file"),
        ([str(path), "--checkpoint", str(tmp_path / "nothing")], "nothing"),
        ([str(path), "--checkpoint", str(tiny), "--tolerance", "-1"], "tolerance"),
        ([str(path), "--checkpoint", str(tiny), "--backend", "abacus"], "abacus"),
    ):
        assert main(["replay", *arguments]) == 2
        assert re.search(reason, capsys.readouterr().err), reason
    with pytest.raises(CheckpointError):
        check(other, path)


def test_hostile_logs_never_crash(tiny: Path, true_lines: Lines, tmp_path: Path) -> None:
    """Random damage gives differences or a named error."""
    rng = random.Random(4)
    junk = [
        None,
        True,
        -1,
        0,
        3,
        2**40,
        10**400,
        1.5,
        "",
        "s0",
        "labels",
        "assistant",
        [],
        {},
        [[]],
        ["user", 0, 9],
    ]

    def damage(value: Any) -> Any:
        if isinstance(value, dict) and value and rng.random() < 0.9:
            key = rng.choice(list(value))
            return {**value, key: damage(value[key])}
        if isinstance(value, list) and value and rng.random() < 0.9:
            index = rng.randrange(len(value))
            return [*value[:index], damage(value[index]), *value[index + 1 :]]
        return rng.choice(junk)

    path = tmp_path / "log"
    num_found = 0
    for round_ in range(25):
        lines = list(true_lines)
        for index in rng.sample(range(round_ % 5 > 0, len(lines)), 12):
            lines[index] = damage(lines[index])
        text = write(path, lines).read_bytes()
        if round_ % 2:
            at = rng.randrange(len(text))
            path.write_bytes(text[:at] + rng.randbytes(20) + text[at:] + b"[" * 100_000)
        try:
            num_found += check(tiny, path).num_differences > 0
        except GuardEngineError:
            num_found += 1
    assert num_found == 25
