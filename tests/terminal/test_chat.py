"""`guardengine chat`: what is shown is what the guard cleared, what is blocked stops the LLM and is forgotten."""

from __future__ import annotations

import io
import os
import pty
import random
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from guarding import END, bad_prompts, deltas, make_bombs_unsafe
from serving import REPLY, Served, served, sync_engine
from upstreams import BREAK_OFF, HANG, upstream

from guardengine import Policy
from guardengine.cli import main
from guardengine.server import ApiKey, ServerSettings
from guardengine.text.tokenizer import Tokenizer

pytestmark = pytest.mark.servers

KEY = "a-key-of-twenty-chars"


@pytest.fixture(scope="module")
def server(folder) -> Iterator[Served]:
    with served(folder, ServerSettings(api_keys=(ApiKey.of(KEY),), drain_timeout_s=2.0)) as server:
        yield server


@pytest.fixture(autouse=True)
def bombs(monkeypatch, folder) -> None:
    make_bombs_unsafe(monkeypatch, Tokenizer.from_dir(folder))


@pytest.fixture(params=[pytest.param("url", marks=pytest.mark.servers), "here"])
def where(server, folder, request) -> list[str]:
    return {"url": ["--url", server.url], "here": ["--checkpoint", str(folder)]}[request.param]


Chat = Callable[..., tuple[int, str, str]]


@pytest.fixture
def chat(monkeypatch, capsys, where) -> Chat:
    """chat(llm, lines) -> exit status, what was shown of replies without its colours, and what was said besides."""
    monkeypatch.setenv("GUARDENGINE_API_KEY", KEY)

    def run(llm: Any, *lines: str, options: tuple[str, ...] = ()) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        arguments = [
            "--upstream",
            llm if isinstance(llm, str) else llm.url,
            "--model",
            "m",
            "--debounce",
            "1",
        ]
        status = main(["chat", *arguments, "--color", "always", *where, *options])
        printed = capsys.readouterr()
        return status, *(re.sub("\x1b\\[\\d*m", "", text) for text in printed)

    return run


def messages(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def asked(llm: Any) -> list[Any]:
    return [request["messages"] for request in llm.requests]


# -- the conversation --------------------------------------------------------------------------------------


def test_replies_are_shown_and_the_conversation_goes_on(chat) -> None:
    with upstream(["Hel", "lo", " there.\u2028"], deltas(REPLY, random.Random(1)), ["Again."]) as llm:
        status, shown, said = chat(llm, "Hi", "", "And?", "/reset", "Hi", "/quit", "never")
        replies = "".join(f"{text}\n" for text in ("Hello there.\u2028", REPLY, "Again."))
        assert (status, shown, said) == (0, re.sub("[\u2028\u200d]", "\ufffd", replies), "")
        first = messages("Hi", "Hello there.\u2028", "And?")
        assert asked(llm) == [messages("Hi"), first, messages("Hi")]
        assert all(request["stream"] is True and request["model"] == "m" for request in llm.requests)


def test_a_blocked_reply_is_stopped_and_forgotten(chat) -> None:
    with upstream(["Fine."], ["Take", " a", " bomb", " and", HANG], ["Better."]) as llm:
        status, shown, said = chat(llm, "One", "Two", "Three")
        assert (status, shown) == (0, "Fine.\nTake a\nBetter.\n")
        assert re.fullmatch(
            r"blocked: the reply is Unsafe, [\w -]+ \(rule debounce\); it was stopped, and the turn is forgotten\n",
            said,
        )
        assert llm.is_left.wait(10)
        assert asked(llm)[2] == messages("One", "Fine.", "Three")


def test_a_blocked_prompt_is_not_sent_on_and_forgotten(chat, folder) -> None:
    with sync_engine(folder) as engine:
        bad_prompts.add(engine.chat.render(messages("a much longer prompt than the others")).prompt_end)
    with upstream(["Fine."], ["Better."]) as llm:
        _, shown, said = chat(llm, "a much longer prompt than the others", "One", "Two")
        assert shown == "Fine.\nBetter.\n"
        assert re.match(r"blocked: the prompt is Unsafe, .*\(rule prompt\); it was not sent to m\n", said)
        assert asked(llm) == [messages("One"), messages("One", "Fine.", "Two")]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_nothing_uncleared_is_shown_wherever_deltas_are_cut(chat, seed) -> None:
    rng = random.Random(seed)
    begin = "".join(rng.choice([" Paris", " 巴黎", " cafe\u0301", ",", " x1", " 𝔘𝔘"]) for _ in range(12))
    with upstream(deltas(f"{begin} bomb at noon", rng), deltas(begin, rng)) as llm:
        _, shown, said = chat(llm, "One", "Two")
        blocked, _, whole = shown.partition("\n")
        assert begin.startswith(blocked)
        assert len(begin) - len(blocked) <= 1  # a space may belong to the bomb's token
        assert whole == f"{begin}\n"
        assert said.count("blocked: ") == 1


@pytest.mark.slow
def test_hits_that_do_not_decide_are_shown_in_the_end(chat, monkeypatch) -> None:
    hit = Policy.hit

    def hits_the_end_too(self: Policy, label: Any) -> str | None:
        return "Unsafe" if (label.role, label.token_id) == ("assistant", END) else hit(self, label)

    monkeypatch.setattr(Policy, "hit", hits_the_end_too)
    bombs = [" bomb", " bomb"]
    with upstream(["A", *bombs], ["One", *bombs, *bombs, " now", HANG]) as llm:
        _, shown, said = chat(llm, "One", "Two", options=("--debounce", "4"))
        assert shown == "A bomb bomb\nOne\n"  # the first ends in three hits
        assert said.startswith("blocked: the reply is Unsafe")


@pytest.mark.slow
def test_what_a_terminal_would_obey_is_not_passed_on(chat) -> None:
    with upstream(["Red: \x1b[31m", "\x07\r.\n", "Next"], 500) as llm:
        status, shown, said = chat(llm, "One", "Two")
        assert shown == "Red: \ufffd[31m\ufffd\ufffd.\nNext\n"
        assert status == 2
        assert "it said <no>" in said


@pytest.mark.slow
def test_an_empty_reply_leaves_nothing_behind(chat) -> None:
    with upstream([], ["Fine."]) as llm:
        assert chat(llm, "One", "Two") == (0, "Fine.\n", "m said nothing\n")
        assert asked(llm) == [messages("One"), messages("Two")]


# -- what goes wrong ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "text"),
    [
        (500, "answered with status 500: it said <no>"),
        (401, "answered with status 401: it said <no>: see --upstream-key-file"),
        (["Fine", BREAK_OFF], "broke off"),
        ([" ", BREAK_OFF], "broke off"),
    ],
)
@pytest.mark.servers
@pytest.mark.parametrize("where", ["url"], indirect=True)
def test_failures_of_the_llm_have_names(chat, reply, text) -> None:
    with upstream(reply) as llm:
        status, _, said = chat(llm, "One", "never sent")
        assert status == 2
        assert said.startswith(f"guardengine: the upstream {llm.url.removesuffix('/v1')} ")
        assert text in said
        assert len(llm.requests) == 1


@pytest.mark.servers
@pytest.mark.parametrize("where", ["url"], indirect=True)
def test_what_cannot_be_reached_or_read_is_said(chat, monkeypatch, tmp_path, folder) -> None:
    status, _, said = chat("http://127.0.0.1:9", "One")
    assert (status, "cannot be reached" in said) == (2, True)
    status, _, said = chat("nowhere", "One")
    assert (status, "url='nowhere'" in said) == (2, True)
    for content in (None, "", "two words"):
        file = tmp_path / "key"
        if content is not None:
            file.write_text(content)
        status, _, said = chat("http://127.0.0.1:9", "One", options=("--upstream-key-file", str(file)))
        assert status == 2
        assert str(file) in said
    with upstream(["never"]) as llm:
        monkeypatch.setenv("GUARDENGINE_API_KEY", KEY + "x")
        status, _, said = chat(llm, "One")
        assert (status, "API key" in said) == (2, True)
        assert llm.requests == []


@pytest.mark.servers
@pytest.mark.parametrize("where", ["url"], indirect=True)
def test_the_llms_key_comes_from_a_file_or_the_environment_and_is_its_alone(
    chat, monkeypatch, tmp_path
) -> None:
    file = tmp_path / "key"
    file.write_text("sk-from-the-file\n")
    monkeypatch.setenv("GUARDENGINE_UPSTREAM_KEY", "sk-from-the-environment")
    with upstream(["A"], ["B"], ["C"]) as llm:
        chat(llm, "One", options=("--upstream-key-file", str(file)))
        chat(llm, "One")
        monkeypatch.delenv("GUARDENGINE_UPSTREAM_KEY")
        chat(llm, "One")
        assert llm.keys == ["Bearer sk-from-the-file", "Bearer sk-from-the-environment", None]


# -- a terminal --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.servers
def test_ctrl_c_stops_the_reply_and_not_the_chat(server) -> None:
    """In a process of its own, on a terminal of its own."""
    with upstream(["Some words, ", "and", " more", HANG], ["The end."]) as llm:
        master, slave = pty.openpty()
        arguments = [
            "--upstream",
            llm.url,
            "--model",
            "m",
            "--url",
            server.url,
            "--policy",
            "loose",
            "--debounce",
            "1000",
        ]
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "guardengine", "chat", *arguments, "--color", "never"],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=os.environ | {"GUARDENGINE_API_KEY": KEY, "TERM": "dumb"},
            start_new_session=True,
            preexec_fn=lambda: _take_terminal(slave),
        )
        os.close(slave)
        seen = ""

        def wait_for(text: str, *, keys: bytes = b"") -> None:
            """keys: pressed, and again each second: readline may miss an interrupt as its prompt appears."""
            nonlocal seen
            began, presses = time.monotonic(), 0
            while text not in seen:
                waited = time.monotonic() - began
                assert waited < 60, seen
                if keys and waited >= presses:
                    os.write(master, keys)
                    presses += 1
                if select.select([master], [], [], 0.1)[0]:
                    seen += os.read(master, 4096).decode()
            seen = seen.partition(text)[2]

        try:
            wait_for("> ")  # after the first line, which says the same
            wait_for("Ctrl-C stops a reply", keys=b"\x03")
            wait_for("> ")
            os.write(master, b"First\n")
            wait_for("Some words")
            wait_for("stopped", keys=b"\x03")
            assert llm.is_left.wait(10)
            wait_for("> ")
            os.write(master, b"Second\n")
            wait_for("The end.")
            wait_for("> ")
            os.write(master, b"/quit\n")
            assert process.wait(20) == 0
        finally:
            process.kill()
            process.wait()
            os.close(master)
        first, kept, second = asked(llm)[1]
        assert (first["content"], second["content"]) == ("First", "Second")
        assert kept["role"] == "assistant"
        assert "Some words, and more".startswith(kept["content"])  # what was shown of it


def _take_terminal(slave: int) -> None:
    import fcntl
    import termios

    fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored by what a shell starts in the background
