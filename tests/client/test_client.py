"""GuardClient and AsyncGuardClient: the server's answers, its errors, and streams that survive their connections."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from serving import REPLY, USER, Served, served, sync_engine

from guardengine import Policy, errors
from guardengine.cli import main
from guardengine.client import AsyncGuardClient, GuardClient, Update
from guardengine.server import ApiKey, ServerSettings

pytestmark = pytest.mark.servers

KEY = "a-key-of-twenty-chars"
LENIENT = {"debounce": 1000, "risk_thresholds": {"Unsafe": 1.0, "Controversial": 1.0}}
TALK = [USER, {"role": "assistant", "content": REPLY}]


@pytest.fixture(scope="module")
def server(folder) -> Iterator[Served]:
    with served(folder, ServerSettings(api_keys=(ApiKey.of(KEY),), drain_timeout_s=2.0)) as server:
        yield server


@pytest.fixture(scope="module")
def client(server) -> Iterator[GuardClient]:
    with GuardClient(server.url, api_key=KEY, reconnect_s=5) as client:
        yield client


@pytest.fixture(scope="module")
def whole(folder) -> list[Any]:
    with sync_engine(folder) as engine:
        stream = engine.open([USER], policy=Policy.strict(**LENIENT))
        stream.append_text(REPLY, is_final=True)
        engine.run()
        return [(x.position, x.token_id, x.risk_probs, stream.span(x)._asdict()) for x in stream.labels]


def pieces(seed: int) -> list[str]:
    rng, found, at = random.Random(seed), [], 0
    while at < len(REPLY):
        size = rng.randint(1, 9)
        found.append(REPLY[at : at + size])
        at += size
    return found


def read(labels: list[dict[str, Any]]) -> list[Any]:
    return [(x["position"], x["token_id"], x["risk_probs"], x["span"]) for x in labels]


def cut_connections(server: Served) -> None:
    """As a network does."""

    async def cut() -> None:
        for connection in list(server.server.server_state.connections):
            if hasattr(connection, "conn"):  # a WebSocket
                connection.transport.abort()

    server.run(cut())


def test_both_clients_have_the_servers_answers(server, client) -> None:
    async def main() -> tuple[Any, Any]:
        async with AsyncGuardClient(server.url + "/v1/", api_key=KEY) as other:
            return await other.moderations(["a", "b"]), await other.guard(TALK, labels="none")

    results, guard = asyncio.run(main())
    assert results == client.moderations(["a", "b"])
    assert client.moderations("a") == results[:1]
    own = client.guard(TALK, policy={"preset": "strict"}, labels="none")
    assert own["response"] == guard["response"]
    assert own["prompt"] == guard["prompt"]


@pytest.mark.parametrize("seed", range(3))
def test_a_stream_whose_connections_break_is_as_one_that_was_not_interrupted(
    server, client, whole, seed
) -> None:
    rng = random.Random(seed)
    with client.stream([USER], policy=LENIENT) as stream:
        shown, labels = 0, []
        for piece in pieces(seed):
            if rng.random() < 0.4:
                cut_connections(server)
            update = stream.append(piece)
            labels += update.labels
            assert update.cleared_chars >= shown
            shown = update.cleared_chars
        cut_connections(server)
        labels += stream.finish().labels
        assert read(stream.labels) == read(labels) == whole
        assert stream.cleared_chars == len(REPLY)
        assert stream.prompt["risk"]


def test_rollback_and_fork_survive_too(server, client, folder) -> None:
    def use(cuts: bool) -> list[Any]:
        def cut() -> None:
            if cuts:
                cut_connections(server)

        with client.stream([USER], policy=LENIENT) as stream:
            stream.append("One two three. Four ")
            cut()
            assert not stream.rollback(2).labels
            cut()
            stream.append("five. ")
            with stream.fork() as branch:
                cut()
                branch.append("six.")
                branch.finish()
                stream.append("seven.")
                cut()
                stream.finish()
                cut()
                turn = stream.append("Really?", role="user")
                assert not turn.labels
                stream.append("Yes ")
                cut()
                stream.finish()
                return [read(stream.labels), read(branch.labels), stream.prompt, stream.verdict]

    assert use(True) == use(False)


def test_an_append_under_way_when_the_connection_breaks_is_done_once(server, whole) -> None:
    async def main() -> list[Any]:
        async with (
            AsyncGuardClient(server.url, api_key=KEY, reconnect_s=5) as client,
            await client.stream([USER], policy=LENIENT) as stream,
        ):
            for index, piece in enumerate(pieces(9)):
                going = asyncio.ensure_future(stream.append(piece))
                await asyncio.sleep(0.0005 * (index % 4))
                await asyncio.to_thread(cut_connections, server)
                assert isinstance(await going, Update)
            await stream.finish()
            return read(stream.labels)

    assert asyncio.run(main()) == whole


@pytest.mark.slow
def test_a_stream_goes_on_at_a_server_that_was_restarted(folder, whole) -> None:
    parts = pieces(4)
    with served(folder) as first:
        client = GuardClient(first.url, reconnect_s=20)
        stream = client.stream([USER], policy=LENIENT)
        for piece in parts[:5]:
            stream.append(piece)
    with served(folder) as second:
        object.__setattr__(client.address, "url", second.url)
        for piece in parts[5:]:
            stream.append(piece)
        stream.finish()
        assert read(stream.labels) == whole
        stream.close()
        with pytest.raises(errors.StreamClosed):
            stream.append("x")
    client.close()


def test_errors_are_the_engines(server, client) -> None:
    for kind, call in (
        (errors.InvalidText, lambda: client.guard([{"role": "user", "content": None}])),
        (errors.StreamTooLong, lambda: client.moderations("a " * 9000)),
        (errors.ConfigError, lambda: client.moderations("a", policy={"debounce": 0})),
        (errors.ConfigError, lambda: client.stream([USER], policy={"actions": {"Rude": "flag"}})),
        (errors.InvalidTokens, lambda: client.stream(token_ids=[999999])),
        (errors.ConfigError, lambda: client.stream()),
        (errors.ServerError, lambda: GuardClient(server.url, api_key=KEY + "x").moderations("a")),
        (errors.ServerError, lambda: GuardClient(server.url, api_key=KEY + "x").stream([USER])),
        (errors.ServerError, lambda: GuardClient("http://127.0.0.1:9").moderations("a")),
        (errors.ServerError, lambda: GuardClient("http://127.0.0.1:9", reconnect_s=0.1).stream([USER])),
        (errors.ConfigError, lambda: GuardClient("127.0.0.1:8000")),
    ):
        with pytest.raises(kind):
            call()


def test_a_refused_append_is_not_part_of_the_stream(client, whole) -> None:
    with client.stream([USER], policy=LENIENT) as stream:
        half = len(REPLY) // 2
        stream.append(REPLY[:half])
        with pytest.raises(errors.StreamTooLong):
            stream.append("a " * 9000)
        stream.append(REPLY[half:])
        stream.finish()
        assert read(stream.labels) == whole


def test_the_client_needs_no_torch() -> None:
    code = "import sys, guardengine.client as c; c.GuardClient; sys.exit(bool({'torch', 'fastapi'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0


# -- the command -------------------------------------------------------------------------------------------


@pytest.fixture
def where(server, folder, monkeypatch, request) -> list[str]:
    monkeypatch.setenv("GUARDENGINE_API_KEY", KEY)
    return {"url": ["--url", server.url], "here": ["--checkpoint", str(folder)]}[request.param]


@pytest.mark.slow
@pytest.mark.parametrize("where", ["url", "here"], indirect=True)
def test_moderate_judges_prompts_and_replies(where, capsys, tmp_path, folder) -> None:
    with sync_engine(folder) as engine:
        label = engine.moderate([USER]).prompt
        expected = engine.moderate(TALK, Policy.strict(debounce=1))
    status = main(["moderate", USER["content"], *where])
    printed = capsys.readouterr().out
    assert f"prompt: {label.risk}" in printed
    assert status == (0 if label.risk == "Safe" else 1)
    assert "verdict: " + ("allow" if status == 0 else "block") in printed
    file = tmp_path / "reply"
    file.write_text(REPLY)
    main(["moderate", "--prompt", USER["content"], "--file", str(file), "--json", "--debounce", "1", *where])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(expected.labels) + 2
    assert '"type": "verdict"' in lines[-1]


@pytest.mark.slow
@pytest.mark.parametrize("where", ["url", "here"], indirect=True)
def test_moderate_reads_a_reply_from_stdin_while_it_comes(where, capsys, monkeypatch) -> None:
    reader, writer = os.pipe()
    data = REPLY.encode()
    os.write(writer, data[:19])
    os.write(writer, data[19:] + b"\x1b[31m\xff")  # an escape sequence, and half a character
    os.close(writer)
    with open(reader) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        main(["moderate", "--prompt", "hi", "--color", "always", *where])
    printed = capsys.readouterr().out
    plain = "".join(part.partition("m")[2] for part in ("m" + printed).split("\x1b["))
    assert REPLY.replace("\u200d", "\ufffd") in plain
    assert "\ufffd[31m\ufffd" in plain


def test_moderate_says_what_is_wrong(capsys, tmp_path) -> None:
    for arguments, text in (
        (["x", "--file", "y", "--checkpoint", "z"], "both given"),
        (["--file", str(tmp_path / "none"), "--checkpoint", "z"], "cannot be read"),
        (["x", "--checkpoint", str(tmp_path / "none")], "no such folder"),
        (["x", "--url", "nowhere"], "url="),
    ):
        assert main(["moderate", *arguments]) == 2
        assert text in capsys.readouterr().err
