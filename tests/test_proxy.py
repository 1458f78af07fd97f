"""The proxy: what the guard has cleared goes out as it came, and nothing else does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from guarding import make_bombs_unsafe
from proxying import DONE, HANG, Proxied, Upstream, chunk, proxied, sse

from guardengine.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def folder(checkpoints) -> Path:
    return checkpoints(dtype="float32")


@pytest.fixture(scope="module")
def tokenizer(folder) -> Tokenizer:
    return Tokenizer.from_dir(folder)


@pytest.fixture(autouse=True)
def bombs_are_unsafe(monkeypatch, tokenizer: Tokenizer) -> None:
    make_bombs_unsafe(monkeypatch, tokenizer)


@pytest.fixture(scope="module")
def upstream() -> Iterator[Upstream]:
    upstream = Upstream()
    yield upstream
    upstream.stop()


@pytest.fixture(scope="module")
def proxy(folder, upstream) -> Iterator[Proxied]:
    with proxied(folder, upstream) as proxy:
        yield proxy


def test_a_safe_stream_comes_as_it_is(proxy, upstream) -> None:
    frames = [
        chunk("", role="assistant"),
        chunk("Hello"),
        chunk(" wor"),
        chunk("ld!"),
        chunk(None, "stop"),
        DONE,
    ]
    upstream.script = lambda asked: sse(*frames)
    reply = proxy.stream()
    print(reply)
    assert [e for e in reply.events if not e.startswith(b":")] == frames
    assert reply.verdicts["choices"][0]["verdict"]["action"] == "allow"


def test_a_bad_one_is_cut(proxy, upstream) -> None:
    upstream.script = lambda asked: sse(chunk("Take a"), chunk(" bomb"), chunk(" and"), HANG)
    reply = proxy.stream()
    print(reply)
    assert (reply.text(), reply.finish(), reply.is_done) == ("Take a", "content_filter", True)
    assert upstream.num_left == 1
