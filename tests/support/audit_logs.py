"""Audit logs for tests: one of everything that an engine may record, and tools to change one."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np

from guardengine import Engine, Label, Policy

SMALL: dict[str, Any] = {"kv_cache_bytes": 2**22, "max_model_len": 256, "block_size": 4, "backend": "cpu"}
Lines = list[dict[str, Any]]


def busy_log(folder: Path, log: Path, *, is_closed: bool = True, **options: Any) -> None:
    """What a service might do: several streams at once, every event, shared prefixes, blocks lost and found."""
    rng = random.Random(5)
    some = lambda most: rng.choices(range(512), k=rng.randint(1, most))  # noqa: E731
    engine = Engine.from_pretrained(folder, **{**SMALL, **options}, audit_log=log)
    prefix = some(20)
    policies = [
        Policy.strict(),
        Policy.loose(debounce=3, hold_back=1, on_timeout="open", risk_thresholds={"Unsafe": 0.4}),
    ]
    streams = [
        engine.open(token_ids=prefix + some(9), policy=policies[i % 2], stream_id=f"s{i}", tenant=f"t{i % 2}")
        for i in range(6)
    ]
    streams.append(
        engine.open(token_ids=some(12), role="assistant", policy=Policy(safe_risks=["Safe", "Unsafe"]))
    )
    for index in range(60):
        stream = rng.choice(streams)
        action = index % 12
        if action == 3:
            streams.append(stream.fork())
        elif action == 5:
            stream.rollback(min(rng.randint(1, 8), len(stream.token_ids) - 1))
        elif action == 7:
            engine.core.fail(stream._state, rng.choice(["timeout", "error", "overload"]))
        elif action == 9:
            streams.append(engine.restore(stream.snapshot(), stream_id=f"restored-{index}"))
        elif action == 11 and len(streams) > 6:
            streams.remove(stream)
            stream.close()
        else:
            stream.append(some(4), role="user" if rng.random() < 0.2 else "assistant")
        if rng.random() < 0.6:
            engine.step()
    engine.run()
    if is_closed:
        engine.close()


def write(path: Path, lines: Lines, *, renumbered: bool = False) -> Path:
    if renumbered:
        lines = [{**line, "n": number} for number, line in enumerate(lines)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def nth(lines: Lines, event: str, index: int = 3, has: str | None = None) -> int:
    """Where the index-th line of an event is."""
    found = [i for i, line in enumerate(lines) if line["event"] == event and (has is None or has in line)]
    return found[min(index, len(found) - 1)]


def shifted(logits: str, by: float) -> str:
    """The same with its last logit raised, or with its lowest bit flipped where `by` is 0."""
    values = np.frombuffer(bytes.fromhex(logits), "<f4").copy()
    if by:
        values[-1] += by
    else:
        values.view(np.uint32)[-1] ^= 1
    return values.tobytes().hex()


def records(log: Path, event: str | None = None) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in log.read_bytes().splitlines()]
    return [line for line in lines if event in (None, line["event"])]


def labels_in(log: Path) -> list[tuple[Any, ...]]:
    return [(line["stream"], *label) for line in records(log, "labels") for label in line["labels"]]


def as_logged(label: Label) -> tuple[Any, ...]:
    logits = np.concatenate((label.risk_logits, label.category_logits)).astype("<f4").tobytes().hex()
    return label.stream_id, label.position, label.role, label.risk, label.category, logits
