"""Minutes of a server's life: clients of every kind at once, killed at random, every answer checked.

    python benchmarks/soak_server.py --minutes 10 --json soak-server.json

`guardengine serve` runs in a process of its own on random stream-tiny weights, the clients in others: each judges whole
conversations (/v1/guard), prompts (/v1/moderations), and replies in pieces over WebSocket, with forks, rollbacks and
streams that are left open, and compares every label and verdict with an engine of its own. Every other second one of
them is killed (SIGKILL) and another one begun. Memory, file descriptors, open streams and KV blocks of the server are
sampled; at the end nothing may be left of the clients.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import random
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
from bench_server import server
from tqdm import tqdm

from guardengine import Engine
from guardengine.checkpoint.random_weights import make_checkpoint
from guardengine.client import GuardClient
from guardengine.errors import GuardEngineError
from guardengine.measuring.files import check_writable, write_json
from guardengine.measuring.machine import machine_stamp
from guardengine.server.json_values import label_json, verdict_json

WORDS = "take the 42 lock, pick; it\n\tdef f(x): 你好 世界 réponse café 🙂 and don't stop. Then".split(" ")  # noqa: SIM905
SETTLE_S = 20


def text_of(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(1, 60)))


class Checker:
    """One client: asks, and says what was wrong."""

    def __init__(self, url: str, checkpoint: Path, rng: random.Random) -> None:
        self.client, self.rng = GuardClient(url, reconnect_s=30, timeout_s=60), rng
        self.engine = Engine.from_pretrained(
            checkpoint, num_threads=1, kv_cache_bytes=2**26, max_model_len=512
        )
        self.left: list[Any] = []  # streams that are left open

    def guard(self) -> bool:
        talk = [{"role": "user", "content": text_of(self.rng)}]
        if self.rng.random() < 0.7:
            talk.append({"role": "assistant", "content": text_of(self.rng).strip()})
        found, own = self.client.guard(talk), self.engine.moderate(talk)
        probs = [label["risk_probs"] for label in (found["response"] or {"labels": []})["labels"]]
        same = probs == [dict(label.risk_probs) for label in own.labels]
        return same and found["prompt"]["risk_probs"] == dict(own.prompt.risk_probs)

    def moderations(self) -> bool:
        text = text_of(self.rng)
        found = self.client.moderations(text)[0]
        own = self.engine.moderate([{"role": "user", "content": text}]).prompt
        return bool(found["flagged"] == (own.risk != "Safe"))

    def stream(self) -> bool:
        rng, talk = self.rng, [{"role": "user", "content": text_of(self.rng)}]
        stream = self.client.stream(talk)
        text, at = text_of(rng), 0
        while at < len(text):
            size = rng.randint(1, 30)
            stream.append(text[at : at + size])
            at += size
            if rng.random() < 0.03:
                branch = stream.fork()
                stream.close()
                stream = branch
            if rng.random() < 0.03:
                self.left.append(stream)  # as clients do that forget
                if len(self.left) > 5:
                    self.left.pop(0).close()
                return True
        stream.finish()
        labels, verdict = stream.labels, stream.verdict
        stream.close()
        with self.engine.open(talk) as own:
            own.append_text(text, is_final=True)
            self.engine.run()
            expected = [label_json(label, own.span(label)) for label in own.labels]
            return labels == expected and verdict == verdict_json(own.verdict)


def work(url: str, checkpoint: Path, seed: int, tell: Any) -> None:
    """A client's life: never ends by itself."""
    rng = random.Random(seed)
    checker = Checker(url, checkpoint, rng)
    while True:
        kind = rng.choice(("guard", "moderations", "stream", "stream"))
        try:
            told = (kind, "right" if getattr(checker, kind)() else "WRONG")
        except GuardEngineError as error:
            told = (kind, type(error).__name__)
        tell.send(told)


class Crowd:
    """The clients that live."""

    def __init__(self, url: str, checkpoint: Path, size: int, rng: random.Random) -> None:
        self.url, self.checkpoint, self.rng = url, checkpoint, rng
        self.counts: Counter[tuple[str, str]] = Counter()
        self.num_killed = 0
        # torch is imported once, and no thread of it lost in a fork.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["guardengine", "guardengine.client"])
        self._alive = [self._begin() for _ in range(size)]

    def _begin(self) -> tuple[Any, Any]:
        ours, theirs = self._context.Pipe(duplex=False)
        process = self._context.Process(
            target=work, args=(self.url, self.checkpoint, self.rng.random(), theirs), daemon=True
        )
        process.start()
        theirs.close()
        return process, ours

    def hear(self) -> None:
        for _, ours in self._alive:
            with contextlib.suppress(EOFError):
                while ours.poll():
                    self.counts[ours.recv()] += 1

    def kill(self, *, replace: bool) -> None:
        self.hear()
        process, ours = self._alive.pop(self.rng.randrange(len(self._alive)))
        if not process.is_alive():
            self.counts["client", "died"] += 1
        process.kill()
        process.join()
        ours.close()
        self.num_killed += 1
        if replace:
            self._alive.append(self._begin())

    def end(self) -> None:
        while self._alive:
            self.kill(replace=False)


def sample(url: str, pid: int) -> dict[str, float]:
    text = httpx.get(f"{url}/metrics", timeout=30).text
    found = {
        name: float(re.search(rf"^guardengine:{name}\S* (\S+)", text, re.M)[1])  # type: ignore[index]
        for name in ("sessions_active", "num_tokens_pending", "kv_cache_usage_perc", "num_requests_running")
    }
    rss = Path(f"/proc/{pid}/statm").read_text().split()[1]
    return found | {
        "rss_mib": int(rss) * os.sysconf("SC_PAGE_SIZE") / 2**20,
        "files": len(os.listdir(f"/proc/{pid}/fd")),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    if options.json is not None:
        check_writable(options.json)
    options.checkpoint, options.quantization, options.threads = None, None, 1
    samples: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = make_checkpoint(Path(folder) / "tiny", "stream-tiny", dtype="float32")
        with server(checkpoint, options) as (url, pid):
            before = sample(url, pid)
            crowd = Crowd(url, checkpoint, options.clients, random.Random(options.seed))
            began, until = time.monotonic(), time.monotonic() + 60 * options.minutes
            with tqdm(total=round(60 * options.minutes), unit="s", desc="soak") as bar:
                while time.monotonic() < until:
                    time.sleep(2)
                    crowd.kill(replace=True)
                    samples.append(sample(url, pid))
                    bar.update(round(time.monotonic() - began) - bar.n)
            crowd.end()
            time.sleep(SETTLE_S)
            after = sample(url, pid)
    third = len(samples) // 3
    grown = statistics.median(s["rss_mib"] for s in samples[-third:]) - statistics.median(
        s["rss_mib"] for s in samples[third : 2 * third]
    )
    counts = {f"{kind} {how}": count for (kind, how), count in sorted(crowd.counts.items())}
    problems = [f"{count} answers: {name}" for name, count in counts.items() if not name.endswith(" right")]
    problems += [
        f"{name} is {after[name]:g} after the last client, {before[name]:g} before the first"
        for name in ("sessions_active", "num_tokens_pending", "files")
        if after[name] > before[name] + (2 if name == "files" else 0)  # of the last sample's own connection
    ]
    print(f"{counts}; {crowd.num_killed} clients killed; before {before}, after {after}")
    print(f"memory of the last third against the second: {grown:+.1f} MiB")
    print("\n".join(problems) or "clean")
    if options.json is not None:
        record = {
            "machine": machine_stamp(),
            "minutes": options.minutes,
            "counts": counts,
            "problems": problems,
        }
        record |= {"killed": crowd.num_killed, "before": before, "after": after, "samples": samples}
        write_json(record, options.json)
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
