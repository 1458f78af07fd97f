"""evaluate(): files of labelled conversations and a checkpoint in, a report out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from guardengine import checks
from guardengine.checkpoint.files import open_checkpoint
from guardengine.checkpoint.hub import resolve_checkpoint
from guardengine.engine.engine import Engine
from guardengine.errors import ConfigError
from guardengine.evaluate.outcomes import STREAM_RULES, Outcome, RuleName
from guardengine.evaluate.predict import (
    CONVERSATIONS_AT_A_TIME,
    Aim,
    judge_gen,
    judge_stream,
    lay_out,
)
from guardengine.evaluate.rows import BadRows, Row, read_rows
from guardengine.evaluate.summary import Report, summarize
from guardengine.text.chat_template import ChatTemplate
from guardengine.text.tokenizer import Tokenizer


def evaluate(
    files: Sequence[str | Path],
    path_or_id: str | Path,
    *,
    aim: Aim | None = None,
    rules: Sequence[RuleName] = STREAM_RULES,
    allow_bad_rows: int = 0,
    max_rows: int | None = None,
    revision: str | None = None,
    progress: bool = False,
    **options: Any,
) -> Report:
    """Judge every row of every file once, and compute the metrics.

    Args:
        files: Files of labelled conversations, see `guardengine.evaluate.rows`.
        path_or_id: A checkpoint folder or hub id, Stream or Gen.
        aim: What is judged in a conversation; by default its last message.
        rules: The rules for a Stream checkpoint. A Gen checkpoint has its own.
        allow_bad_rows: How many rows may be unusable, in all files together.
        max_rows: Judge only the first so many rows of each file.
        revision: The revision of the checkpoint on the hub.
        progress: Show progress bars.
        **options: Options of `Engine.from_pretrained`.

    Returns:
        The report, with one section for each file and target.

    Raises:
        ConfigError: An option or a file is not valid.
        InvalidText, StreamTooLong: A row cannot be judged, and no more bad rows are allowed; the message has its file
            and line. With a Stream checkpoint this is found before anything is computed.
        CheckpointError: The checkpoint cannot be read.
    """
    _check(rules, allow_bad_rows, max_rows)
    aim = aim or Aim()
    bad_rows = BadRows(allow_bad_rows)
    rows = [row for file in _distinct(files) for row in read_rows(file, bad_rows, max_rows)]
    folder = resolve_checkpoint(path_or_id, revision)
    with open_checkpoint(folder) as checkpoint:
        config = checkpoint.config
    is_gen = config.heads is None
    if is_gen:
        with Engine.from_pretrained(folder, progress=progress, **options) as engine:
            with _bar("moderating", len(rows), "row", progress) as bar:
                outcomes = judge_gen(engine, rows, aim, bad_rows, bar.update)
            stats = engine.stats()
    else:
        outcomes, stats = _run_stream(rows, aim, folder, config, bad_rows, progress, options)
    return Report(
        checkpoint=str(path_or_id),
        kind="Gen" if is_gen else "Stream",
        thinking=aim.thinking,
        engine={
            key: stats.get(key)
            for key in ("backend", "isa", "dtype", "quantization", "num_threads", "version")
        },
        sections=summarize(outcomes, ("answer",) if is_gen else tuple(rules)),
        bad_rows=tuple(bad_rows.reasons),
    )


def _run_stream(
    rows: list[Row],
    aim: Aim,
    folder: Path,
    config: Any,
    bad_rows: BadRows,
    progress: bool,
    options: dict[str, Any],
) -> tuple[list[Outcome], dict[str, Any]]:
    limit = min(
        options.pop("max_model_len", None) or config.max_position_embeddings, config.max_position_embeddings
    )
    if not (folder / "tokenizer.json").exists():
        raise ConfigError(
            f"{folder} has no tokenizer.json, so text cannot be rendered; add Qwen3's tokenizer.json to it"
        )
    chat = ChatTemplate.from_dir(folder, Tokenizer.from_dir(folder))
    with _bar("rendering", len(rows), "row", progress) as bar:
        laid_out = lay_out(rows, aim, chat, limit, bad_rows, bar.update)
    if not laid_out:
        raise ConfigError("no row can be judged; see the bad rows, or raise max_model_len")
    longest = max(len(each.token_ids) for each in laid_out)
    options.setdefault("max_num_streams", CONVERSATIONS_AT_A_TIME)
    with Engine.from_pretrained(folder, max_model_len=longest, progress=progress, **options) as engine:
        total = sum(len(each.token_ids) for each in laid_out)
        with _bar("moderating", total, "token", progress) as bar:
            outcomes = judge_stream(engine, laid_out, bar.update)
        return outcomes, engine.stats()


def _bar(what: str, total: int, unit: str, progress: bool) -> Any:
    return tqdm(desc=what, total=total, unit=unit, disable=not progress)


def _distinct(files: Sequence[str | Path]) -> list[Path]:
    paths = [Path(file) for file in files]
    if not paths or len({path.resolve() for path in paths}) < len(paths):
        raise ConfigError("give one file of labelled conversations or more, each once")
    return paths


def _check(rules: Sequence[str], allow_bad_rows: int, max_rows: int | None) -> None:
    if isinstance(rules, str) or not rules or not set(rules) <= set(STREAM_RULES):
        raise ConfigError(f"rules={rules!r}: pass a list with one or more of {', '.join(STREAM_RULES)}")
    checks.whole_number("allow_bad_rows", allow_bad_rows, 0)
    if max_rows is not None:
        checks.whole_number("max_rows", max_rows, 1)
