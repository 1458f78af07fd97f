"""For tests of annotating: an engine that answers at once, and data sets on disk."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from guardengine import Engine, GenModeration, InvalidText, Policy, StreamTooLong, Verdict
from guardengine.annotate.run import Options, Report, annotate
from guardengine.labels import UNPARSABLE

GUARD = ["guard_risk", "guard_category", "guard_scores", "guard_first_flag_token", "guard_first_flag_char"]


def open_engine(checkpoint: Path) -> Iterator[Engine]:
    """An engine on one thread, whole when it is closed."""
    with Engine.from_pretrained(checkpoint, kv_cache_bytes=2**23, max_model_len=512, num_threads=1) as engine:
        yield engine
        engine.check_integrity()


class FakeGen:
    """Answers as a Gen checkpoint does, from a digest of the last message. `calls`: the sizes of the batches that it
    answered. Content "refuse" is refused, "endless" is too long, "gibberish" has no answer."""

    def __init__(self, on_call: Callable[[], None] = lambda: None) -> None:
        self.calls: list[int] = []
        self._on_call = on_call

    def moderate_many(
        self, conversations: Sequence[Any], policy: Policy | None = None, *, on_unfit: str = "raise"
    ) -> list[GenModeration | InvalidText | StreamTooLong]:
        assert policy is not None
        self._on_call()
        self.calls.append(len(conversations))
        return [self._answer(messages, policy) for messages in conversations]

    def _answer(self, messages: Any, policy: Policy) -> GenModeration | InvalidText | StreamTooLong:
        content = messages[-1]["content"]
        if content == "refuse":
            return InvalidText("messages[0]: refused")
        if content == "endless":
            return StreamTooLong("a stream of 9999 tokens exceeds max_model_len=99")
        number = hashlib.sha256(content.encode()).digest()[0]
        safety = ("Safe", "Unsafe", "Controversial")[number % 3]
        is_hit = safety not in policy.safe_risks
        verdict = Verdict("allow", "Safe", None, None, "none", 0)
        if is_hit:
            verdict = Verdict("block", safety, "Violent", None, "gen", 0)
        if content == "gibberish":
            safety, verdict = UNPARSABLE, Verdict("block", "Unknown", None, None, "unparsable", 0)
        return GenModeration(
            role=messages[-1]["role"],
            safety=safety,
            categories=() if safety in ("Safe", UNPARSABLE) else ("Violent", "PII"),
            refusal=None,
            safety_probs={} if safety == UNPARSABLE else {"Safe": number / 256, "Unsafe": 1 - number / 256},
            category_probs={},
            refusal_probs={},
            text="",
            verdict=verdict,
            num_prompt_tokens=len(content),
            num_answer_tokens=3,
        )


def checkpoint_folder(folder: Path) -> Path:
    """A folder that has a digest, and no weights."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    return folder


def run(
    source: Path, out: Path, checkpoint: Path, engine: Any = None, *, restart: bool = False, **options: Any
) -> Report:
    engine = FakeGen() if engine is None else engine
    load: Callable[[Path], AbstractContextManager[Any]] = lambda _: nullcontext(engine)  # noqa: E731
    return annotate(source, out, checkpoint, Options(**options), restart=restart, load=load)


def write_lines(path: Path, rows: Sequence[Any]) -> Path:
    """JSON lines: objects as JSON, bytes as they are."""
    path.write_bytes(
        b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)
    )
    return path


def some_rows(count: int) -> list[Any]:
    """Prompts with responses; rows 5, 17 and 40 cannot be judged."""
    rows: list[Any] = [
        {
            "id": i,
            "prompt": f"number {i}: " + "word " * (7 * i % 60),
            "response": "réponse 巴黎 " * (i % 40 + 1),
        }
        for i in range(count)
    ]
    rows[5] = {"id": 5, "prompt": 5, "response": "a number"}
    rows[17] = b"{not JSON"
    rows[40] = {"id": 40, "prompt": "a\ud800b", "response": "lone"}
    return rows


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def guard_values(row: dict[str, Any]) -> list[Any]:
    return [row[name] for name in GUARD]


ROWS: list[Any] = [
    {
        "prompt": f"Prompt {i}",
        "response": f"Yes {'na ' * (i * 7 % 11)}{i}",
        "pad": random.Random(i).randbytes(300).hex(),
    }
    for i in range(60)
]  # padded, so that OUT is larger than the journal
ROWS[7], ROWS[41] = {"prompt": None, "response": "x"}, b'{"prompt": "torn'
NUM_BAD = 2


class Files:
    """A data set, where it is to be written, and what is written when nothing happens."""

    def __init__(self, folder: Path, suffix: str = ".jsonl") -> None:
        self.folder = folder
        self.checkpoint = checkpoint_folder(folder / "fake")
        self.source = write_lines(folder / "in.jsonl", ROWS)
        self.out = folder / f"out{suffix}"
        self.journal = Path(f"{self.out}.partial")
        self.bad = Path(f"{self.out}.bad.jsonl")
        whole = folder / f"whole{suffix}"
        assert self.run(out=whole).num_bad == NUM_BAD
        self.expected = whole.read_bytes(), Path(f"{whole}.bad.jsonl").read_bytes()

    def run(self, engine: Any = None, out: Path | None = None, **options: Any) -> Any:
        options = {"window_rows": 6, **options}
        return run(self.source, out or self.out, self.checkpoint, engine, **options)

    def stop_after(self, num_calls: int) -> None:
        """Annotate until the engine was asked so often."""
        calls = iter(range(num_calls))

        def fail() -> None:
            if next(calls, None) is None:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            self.run(FakeGen(fail))
        assert not self.out.exists()

    def num_journaled(self) -> int:
        return max(0, self.journal.read_bytes().count(b"\n") - 1) if self.journal.exists() else 0

    def finish(self) -> None:
        """Go on, and check that no row is judged twice, that all are written once, and that nothing is left over."""
        num_before = self.num_journaled()
        gen = FakeGen()
        report = self.run(gen)
        assert report.num_resumed == num_before
        assert len(ROWS) - NUM_BAD <= num_before + sum(gen.calls) <= len(ROWS)
        self.check()

    def check(self) -> None:
        assert (self.out.read_bytes(), self.bad.read_bytes()) == self.expected
        assert sorted(path.name for path in self.folder.glob(f"{self.out.name}*")) == [
            self.out.name,
            self.bad.name,
        ]
