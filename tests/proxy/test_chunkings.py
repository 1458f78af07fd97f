"""Replies in adversarial pieces: no unsafe character comes out of the proxy, and of a safe reply all of it does.

Each seed is a reply of up to three choices, in several fields, cut anywhere: into deltas, in the middle of words and
characters that belong together, between fields and choices, into events of one or more choices, and the events into
bytes. GUARDENGINE_CHUNKINGS says how many seeds are tried.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import pytest
from guarding import USER, deltas, make_bombs_unsafe
from launching import sync_engine
from proxying import DONE, event
from tqdm import tqdm

from guardengine import AsyncEngine, Policy
from guardengine.proxy import ProxySettings
from guardengine.proxy.choice import ChoiceGuard
from guardengine.proxy.events import Event, EventReader
from guardengine.proxy.reply_stream import ModeratedStream
from guardengine.text.tokenizer import Tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.servers]

NUM_CHUNKINGS = int(os.environ.get("GUARDENGINE_CHUNKINGS", "60"))
AT_ONCE = 16
PIECES = [
    " the",
    " Paris",
    " (巴黎",
    "，)",
    " n'est-ce pas?",
    "\n\n",
    " cafe\u0301",
    " 👩‍👩‍👧",
    ".",
    " It's",
    "  two",
    " 12345",
    "\t",
]
PIECES += [
    " bo",
    "mb",
    "bombast",
    " b",
    "om",
    " BOMB",
    "\u2028data: x",
    ' {"a": "',
    "\\",
    " <|im_end|>",
    " </think>",
]
BAD = " bomb"
FIELDS = [("content", name, "refusal", "arguments") for name in ("reasoning_content", "both")]


class Said(NamedTuple):
    """What a choice says, in order: fields and texts."""

    parts: list[tuple[str, str]]

    def text(self, field: str) -> str:
        return "".join(text for name, text in self.parts if name == field)


def say(rng: random.Random, is_bad: bool) -> Said:
    words = [rng.choice(PIECES) for _ in range(rng.randint(1, 24))]
    text = "".join(words).replace("bomb", "b.omb") + "."
    if is_bad:
        at = rng.choice([0, len(text), rng.randint(0, len(text))])
        text = f"{text[:at]}.{BAD}. {text[at:]}"
    fields = rng.sample(rng.choice(FIELDS), rng.choice([1, 1, 2, 3]))
    parts, left = [], deltas(text, rng, rng.choice([1, 3, 9, 200]))
    field = fields[0]
    for piece in left:
        if rng.random() < 0.15:
            field = rng.choice(fields)
        parts.append((field, piece))
        if len(fields) > 1 and rng.random() < 0.05:  # in the middle of something
            parts.append((rng.choice(fields), "ok "))
    return Said(parts)


def delta_of(field: str, text: str) -> dict[str, Any]:
    if field == "arguments":
        return {"tool_calls": [{"index": 0, "function": {"arguments": text}}]}
    if field == "both":
        return {"reasoning": text, "reasoning_content": text}
    return {field: text}


def shown_in(delta: dict[str, Any]) -> dict[str, str]:
    found = {name: value for name, value in delta.items() if isinstance(value, str) and name != "role"}
    for call in delta.get("tool_calls", ()):
        found["arguments"] = call["function"].get("arguments", "")
    return found


def as_bytes(rng: random.Random, said: list[Said]) -> list[bytes]:
    """The stream of these choices, in pieces."""
    queues = [[{"delta": delta_of(*part)} for part in each.parts] for each in said]
    for queue in queues:
        if rng.random() < 0.5:
            queue[-1]["finish_reason"] = "stop"
        else:
            queue.append({"delta": {}, "finish_reason": "stop"})
        if rng.random() < 0.5:
            queue.insert(0, {"delta": {"role": "assistant", "content": ""}})
    events = []
    while any(queues):
        chosen = [index for index, queue in enumerate(queues) if queue]
        chosen = rng.sample(chosen, rng.randint(1, len(chosen)) if rng.random() < 0.2 else 1)
        choices = [{"index": i, "finish_reason": None, "logprobs": None, **queues[i].pop(0)} for i in chosen]
        raw = event({"id": "c", "object": "chat.completion.chunk", "choices": choices})
        events.append(raw.replace(b"\n\n", b"\r\n\r\n") if rng.random() < 0.1 else raw)
        if rng.random() < 0.1:
            events.append(b": alive\n\n")
    whole = b"".join([*events, DONE])
    return deltas(whole, rng, rng.choice([3, 50, 1000, 100_000]))


async def run(engine: AsyncEngine, seed: int) -> bool:
    """Whether a choice was cut."""
    rng = random.Random(seed)
    bad = [rng.random() < 0.5 for _ in range(rng.choice([1, 1, 2, 3]))]
    said = [say(rng, is_bad) for is_bad in bad]
    policy = Policy.strict(debounce=1, hold_back=rng.choice([0, 0, 3]))
    on_block = rng.choice(["filter", "refuse"])
    settings = ProxySettings(upstream="http://x", on_block=on_block, refusal="[no]")
    stream = await engine.open([USER], policy=policy)
    await stream.prompt()
    streams = [stream, *[await stream.fork() for _ in bad[1:]]]
    guards = [ChoiceGuard(each, policy, 60.0) for each in streams]
    pieces = as_bytes(rng, said)

    async def events() -> AsyncIterator[Event]:
        reader = EventReader(2**20)
        for piece in pieces:
            for each in reader.add(piece):
                yield each
            if rng.random() < 0.3:
                await asyncio.sleep(0)
        for each in reader.finish():
            yield each

    out = b""
    async for shown in ModeratedStream(events(), guards, None, "m", settings).frames():
        out += shown
    chunks = [json.loads(line[6:]) for line in out.split(b"\n") if line.startswith(b"data: {")]
    assert b"upstream_" not in out, (seed, out)
    assert out.endswith(DONE), seed
    for index, each in enumerate(said):
        parts = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
        found: dict[str, str] = {}
        for part in parts:
            for name, text in shown_in(part["delta"]).items():
                found[name] = found.get(name, "") + text
        reasons = [part["finish_reason"] for part in parts if part["finish_reason"]]
        is_cut = guards[index].is_cut
        assert reasons == [("content_filter" if on_block == "filter" else "stop") if is_cut else "stop"], seed
        if is_cut and on_block == "refuse":
            found["content"] = found["content"].removesuffix("[no]")
        expected = {name: each.text(name) for name in ("content", "refusal", "arguments")}
        expected["reasoning"] = each.text("both")
        expected["reasoning_content"] = "".join(
            text for name, text in each.parts if name in ("reasoning_content", "both")
        )
        for name, text in expected.items():
            shown = found.get(name, "")
            assert text.startswith(shown), (seed, index, name, text, shown)
            assert is_cut or shown == text, (seed, index, name)
            assert BAD + "." not in shown, (seed, index, name, shown)
        is_in_one_field = any(BAD + "." in text for text in expected.values())
        assert is_cut or not is_in_one_field, (seed, index)
        if is_in_one_field and len({name for name, _ in each.parts}) == 1 and not policy.hold_back:
            name, text = next((name, text) for name, text in expected.items() if text)
            assert found.get(name, "") == text[: text.index(BAD + ".")], seed
    return any(guard.is_cut for guard in guards)


def test_no_unsafe_character_comes_out(folder, monkeypatch) -> None:
    make_bombs_unsafe(monkeypatch, Tokenizer.from_dir(folder))

    async def main() -> None:
        seeds, num_cut = iter(tqdm(range(NUM_CHUNKINGS), disable=None)), 0

        async def work() -> None:
            nonlocal num_cut
            for seed in seeds:
                is_cut = await asyncio.wait_for(run(engine, seed), 60)
                num_cut += is_cut

        async with AsyncEngine(sync_engine(folder, kv_cache_bytes=2**25, max_model_len=4096)) as engine:
            async with asyncio.TaskGroup() as group:
                for _ in range(AT_ONCE):
                    group.create_task(work())
            assert (await engine.stats())["streams_open"] == 0
            await engine.check_integrity()
        assert 0.3 < num_cut / NUM_CHUNKINGS < 0.9

    asyncio.run(main())
