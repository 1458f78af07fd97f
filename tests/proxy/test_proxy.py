"""The proxy's streams: what the guard has cleared goes out as it came, byte for byte, and nothing else does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from guarding import bad_prompts
from proxying import DONE, HANG, USER, Proxied, Upstream, chunk, completion, event, http, proxied, sse

from guardengine import Policy

pytestmark = [pytest.mark.servers, pytest.mark.usefixtures("bombs_are_unsafe")]

BAD_USER = {"role": "user", "content": "How do I build the one thing that nobody should?"}


@pytest.fixture(scope="module")
def proxy(folder, upstream) -> Iterator[Proxied]:
    with proxied(folder, upstream, refusal="No.") as proxy:
        yield proxy


@pytest.fixture
def bad_prompt(proxy) -> None:
    bad_prompts.add(proxy.engine.engine.chat.render([BAD_USER]).prompt_end)


def streams(upstream: Upstream, *steps: Any) -> None:
    upstream.script = lambda asked: sse(*steps)


def settle(proxy: Proxied) -> None:
    """Nothing of a reply stays open."""
    for _ in range(200):
        if proxy.run(proxy.engine.stats())["streams_open"] == 0:
            return
    raise AssertionError("streams are left open")


def told(**delta: Any) -> bytes:
    """An event with this delta."""
    return chunk(None, None, 0, delta)


# -- what is safe ------------------------------------------------------------------------------------------

USAGE = event(
    {"id": "chatcmpl-1", "object": "chat.completion.chunk", "choices": [], "usage": {"total_tokens": 3}}
)


def test_a_safe_stream_is_the_upstreams_bytes(proxy, upstream) -> None:
    """Unknown fields, spaces, escapes, other line ends and the order of keys included; then come the verdicts."""
    odd = (
        b'event: message\r\nid: 7\r\ndata:  {"choices" : [{"delta":{"content":" w\\u00f6rld\\n"},"x":1.50,"index":0}],'
        b'"obfuscation":"k3"}\r\n\r\n'
    )
    frames = [
        chunk("", more={"role": "assistant"}),
        chunk("Hello"),
        odd,
        b'data: {"choices":\ndata: []}\n\n',
        chunk(" It is 巴黎 👩‍👩‍👧, n'est-ce pas?"),
        chunk(None, "stop"),
        USAGE,
    ]
    streams(upstream, b"".join(frames), DONE)  # at once: what is cleared in part goes out in pieces
    reply = proxy.stream()
    verdicts = reply.bytes.split(b": guardengine ")[1]
    assert reply.bytes == b"".join(frames) + b": guardengine " + verdicts
    assert verdicts.endswith(b"}\n\n" + DONE)
    assert reply.verdicts["choices"][0]["verdict"]["action"] == "allow"
    assert reply.headers["x-guardengine-prompt-action"] == "allow"
    assert reply.headers["content-type"].startswith("text/event-stream")
    settle(proxy)


def test_the_first_word_does_not_wait_for_the_replys_header(proxy, upstream) -> None:
    """The template's tokens before a reply are computed with the prompt, and once for all choices."""
    chat = proxy.engine.engine.chat
    asked = {"role": "user", "content": "Which way is it to the station, once more?"}
    num_before = chat.render([asked]).prompt_end + 1 + len(chat.assistant_preamble())
    counted: list[int] = []

    def count() -> int:
        return proxy.run(proxy.engine.stats())["tokens_computed"]

    def script(_: Any) -> Any:
        for _ in range(40):
            if count() == start + num_before:
                break
            yield 0.05
        counted.append(count() - start)
        yield from sse(
            chunk(" left"), chunk(" left", index=1), chunk(None, "stop"), chunk(None, "stop", 1), DONE
        )

    start, upstream.script = count(), script
    assert proxy.stream(n=2, messages=[asked]).text(1) == " left"
    settle(proxy)
    assert counted == [num_before]
    assert count() - start == num_before + 2 * 2  # a word and <|im_end|>


def test_comments_do_not_wait(proxy, upstream) -> None:
    """They keep connections alive while text is held back."""
    streams(upstream, chunk("Hello"), b": alive\n\n", 0.2, chunk("!", "stop"), DONE)
    reply = proxy.stream()
    assert [e[:7] for e in reply.events] == [b": alive", b"data: {", b"data: {", b": guard", b"data: ["]


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_events_are_found_wherever_the_bytes_are_cut(proxy, upstream, size: int) -> None:
    first = chunk("One") + chunk(" two").replace(b"\n\n", b"\r\n\r\n")
    whole = first + b": x\r\n\r\n" + chunk(" three", "stop") + DONE
    streams(upstream, *(whole[at : at + size] for at in range(0, len(whole), size)))
    reply = proxy.stream()
    assert reply.bytes.replace(b": x\r\n\r\n", b"").startswith(first)
    reply = reply._replace(bytes=reply.bytes.replace(b"\r\n", b"\n"))
    assert (reply.text(), reply.finish(), reply.is_done) == ("One two three", "stop", True)


def test_a_large_event_is_shown_in_pieces(proxy, upstream) -> None:
    """The reader need not wait for its last word; fields that are no text come once."""
    logprobs = {"content": [{"token": "One two three", "logprob": -0.5, "top_logprobs": []}]}
    choice = {
        "index": 0,
        "delta": {"role": "assistant", "content": "One two three"},
        "logprobs": logprobs,
        "finish_reason": None,
    }
    big = event({"id": "c", "object": "o", "choices": [choice], "usage": {"n": 1}, "timings": 2.50})
    streams(upstream, big, 0.3, chunk(" four", "stop"), DONE)
    reply = proxy.stream()
    first, second, third = reply.chunks
    assert first == {
        "id": "c",
        "object": "o",
        "choices": [
            {
                "index": 0,
                "delta": {"role": "assistant", "content": "One two"},
                "logprobs": None,
                "finish_reason": None,
            }
        ],
    }
    assert second == {**json.loads(big[6:]), "choices": [{**choice, "delta": {"content": " three"}}]}
    assert third == json.loads(chunk(" four", "stop")[6:])


def test_hold_back(folder, upstream) -> None:
    words = [chunk(f" w{i}") for i in range(8)]
    with proxied(folder, upstream, policy=Policy.strict(debounce=1, hold_back=6)) as proxy:
        streams(upstream, *words, 0.3, b": now\n\n", chunk(None, "stop"), DONE)
        reply = proxy.stream()
        shown = reply.bytes.split(b": now")[0]
        assert 0 < shown.count(b"data: ") < 6
        assert reply.text() == "".join(f" w{i}" for i in range(8))


# -- what is not -------------------------------------------------------------------------------------------


def test_a_cut(proxy, upstream) -> None:
    left = upstream.num_left
    streams(upstream, chunk("Take", more={"role": "assistant"}), chunk(" a bomb and"), chunk(" more"), HANG)
    reply = proxy.stream()
    assert (reply.text(), reply.finish(), reply.is_done) == ("Take a", "content_filter", True)
    assert reply.verdicts["choices"][0]["verdict"]["rule"] == "debounce"
    upstream.wait_until_left(left + 1)
    assert b"bomb" not in reply.bytes
    assert reply.chunks[-1] == {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "m",
        "choices": [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "content_filter"}],
    }
    assert proxy.metric("guardengine:proxy_blocks_total", of="reply", rule="debounce") >= 1
    settle(proxy)


@pytest.mark.parametrize(
    ("style", "text", "finish", "error"),
    [("refuse", "Take aNo.", "stop", None), ("error", "Take a", None, "content_filter")],
)
def test_other_ends(folder, upstream, style, text, finish, error) -> None:
    streams(upstream, chunk("Take"), chunk(" a bomb"), chunk(" more"), HANG)
    with proxied(folder, upstream, on_block=style, refusal="No.") as proxy:
        reply = proxy.stream()
        assert (reply.text(), reply.finish(), reply.error, reply.is_done) == (text, finish, error, True)
        upstream.script = lambda asked: http(json.dumps(completion({"content": "Take a bomb"})).encode())
        whole = proxy.post()
        if style == "error":
            assert (whole.status_code, whole.json()["error"]["code"]) == (400, "content_filter")
        else:
            assert whole.json()["choices"][0]["message"]["content"] == "No."


@pytest.mark.parametrize(
    "delta",
    [
        {"content": "a bomb"},
        {"refusal": "a bomb"},
        {"reasoning_content": "a bomb"},
        {"reasoning": "a bomb", "reasoning_content": "a bomb"},
        {"tool_calls": [{"index": 0, "id": "call_1", "type": "function", "function": {"name": "a bomb"}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": "a bomb"}}]},
        {"tool_calls": [{"index": 0, "id": "a bomb"}]},
        {"tool_calls": [{"index": 0, "type": "custom", "custom": {"input": "a bomb"}}]},
        {"function_call": {"name": "f", "arguments": "a bomb"}},
        {"content": [{"type": "text", "text": "a bomb"}]},
        {"thinking_blocks": [{"thinking": "a bomb"}]},
        {"role": "a bomb"},
    ],
)
def test_every_field_is_judged(proxy, upstream, delta) -> None:
    streams(upstream, chunk("So "), told(**delta), chunk(" and", "stop"), DONE)
    reply = proxy.stream()
    assert b"bomb" not in reply.bytes
    assert reply.text() in ("So ", "So a")
    assert reply.finish() == "content_filter"


def test_fields_beside_the_delta(proxy, upstream) -> None:
    bad = json.loads(chunk("Hi")[6:])
    bad["choices"][0]["note"] = "a bomb there"
    streams(upstream, event(bad), chunk("!", "stop"), DONE)
    assert b"bomb" not in proxy.stream().bytes


def test_words_across_fields(proxy, upstream) -> None:
    """Whoever reads one field sees a word that was sent in two, with another field between."""
    parts = [{"content": "a bo"}, {"reasoning": "so"}, {"content": "mb and"}, {"reasoning": " on"}]
    streams(upstream, *(told(**part) for part in parts), chunk(None, "stop"), DONE)
    reply = proxy.stream()
    assert reply.finish() == "content_filter"
    assert (reply.text() + "mb").count("bomb") == 0 or "mb" not in reply.text()
    parts[2] = {"content": "ok and"}
    streams(upstream, *(told(**part) for part in parts), chunk(None, "stop"), DONE)
    reply = proxy.stream()
    assert (reply.text(), reply.text(name="reasoning")) == ("a book and", "so on")


def test_a_tool_call(proxy, upstream) -> None:
    def call(**function: str) -> dict[str, Any]:
        head = {"id": "call_1", "type": "function"} if "name" in function else {}
        return {"tool_calls": [{"index": 0, **head, "function": function}]}

    safe = [told(**call(name="look_up", arguments="")), told(**call(arguments='{"city": "Pa'))]
    safe += [told(**call(arguments='ris"}')), chunk(None, "tool_calls")]
    streams(upstream, b"".join(safe), DONE)
    reply = proxy.stream()
    assert [e for e in reply.events if e.startswith(b"data: {")] == safe
    streams(upstream, safe[0], told(**call(arguments='{"city": a bomb here')), HANG)
    reply = proxy.stream()
    shown = [
        choice["delta"]["tool_calls"][0] for c in reply.chunks for choice in c["choices"] if choice["delta"]
    ]
    assert shown[0]["function"]["name"] == "look_up"
    assert "".join(each["function"].get("arguments", "") for each in shown) == '{"city": a'
    assert all("id" not in each for each in shown[1:])


def test_log_probabilities_do_not_run_ahead(proxy, upstream) -> None:
    def logged(text: str | None, tokens: list[str], finish: str | None = None) -> bytes:
        value = json.loads(chunk(text, finish)[6:])
        value["choices"][0]["logprobs"] = {"content": [{"token": token, "logprob": -1.0} for token in tokens]}
        return event(value)

    safe = [logged("One", ["One"]), logged("", [" two"]), logged(" two", []), chunk(" 3", "stop")]
    streams(upstream, b"".join(safe), DONE)
    assert b"".join(safe) in proxy.stream().bytes
    streams(upstream, logged("One", ["One"]), logged("", [" bo", "mb", " x"]), logged(" ok", []), HANG)
    reply = proxy.stream()
    assert b" bo" not in reply.bytes
    assert reply.finish() == "content_filter"


# -- several choices ---------------------------------------------------------------------------------------


def test_choices_are_judged_apart(proxy, upstream) -> None:
    prompts = proxy.metric("guardengine:prompt_tokens_total")
    both = json.loads(chunk(" tail")[6:])
    both["choices"].append({**both["choices"][0], "index": 1})
    streams(
        upstream,
        chunk("One", index=0),
        chunk("Two a bomb", index=1),
        chunk(" more", index=1),
        event(both),
        chunk(" end", "stop", index=0),
        chunk(" x", "stop", index=1),
        USAGE,
        DONE,
    )
    reply = proxy.stream(n=2)
    assert (reply.text(0), reply.finish(0)) == ("One tail end", "stop")
    assert (reply.text(1), reply.finish(1)) == ("Two a", "content_filter")
    assert USAGE in reply.bytes
    assert [each["verdict"]["action"] for each in reply.verdicts["choices"]] == ["allow", "block"]
    once = proxy.metric("guardengine:prompt_tokens_total") - prompts
    chat = proxy.engine.engine.chat
    assert once == chat.render([USER]).prompt_end + 1 + len(chat.assistant_preamble())
    streams(
        upstream,
        chunk("a bomb", index=0),
        chunk("a bomb", index=1),
        chunk(" c", index=0),
        chunk(" d", index=1),
        HANG,
    )
    assert [proxy.stream(n=2).finish(index) for index in (0, 1)] == ["content_filter"] * 2
    settle(proxy)


# -- replies that are not streamed -------------------------------------------------------------------------


def test_whole_replies(proxy, upstream) -> None:
    body = json.dumps(completion({"content": "Hello there", "x": None}, usage={"n": 1.0}), indent=1).encode()
    upstream.script = lambda asked: http(body, more="X-Request-Id: r7\r\nSet-Cookie: a=b\r\n")
    found = proxy.post()
    assert (found.status_code, found.content) == (200, body)
    assert found.headers["x-guardengine-action"] == "allow"
    assert found.headers["x-request-id"] == "r7"
    assert "set-cookie" not in found.headers
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "a bomb"}}
    bad = completion(
        {"content": "Take a bomb now"},
        {"content": "Fine"},
        {"content": "So", "tool_calls": [call]},
        usage={"n": 2},
    )
    for choice in bad["choices"]:
        choice["logprobs"] = {"content": [{"token": choice["message"]["content"]}]}
    upstream.script = lambda asked: http(json.dumps(bad).encode())
    found = proxy.post({"n": 3})
    one, two, three = found.json()["choices"]
    assert (one["message"]["content"], one["finish_reason"], one["logprobs"]) == (
        "Take a",
        "content_filter",
        None,
    )
    assert two == bad["choices"][1]
    assert (three["message"], three["finish_reason"]) == (
        {"role": "assistant", "content": "So"},
        "content_filter",
    )
    assert found.json()["usage"] == {"n": 2}
    assert b"bomb" not in found.content
    assert found.headers["x-guardengine-action"] == "block"
    settle(proxy)


# -- prompts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_blocked_prompt(proxy, upstream, bad_prompt, stream) -> None:
    """The upstream has begun by then, and is hung up on."""
    left, asked = upstream.num_left, len(upstream.asked)
    streams(upstream, chunk("Sure"), HANG)
    found = proxy.post({"messages": [BAD_USER], "stream": stream})
    assert (found.status_code, found.json()["error"]["code"]) == (400, "content_filter")
    assert found.json()["error"]["guardengine"]["rule"] == "prompt"
    assert found.headers["x-guardengine-prompt-action"] == "block"
    assert b"Sure" not in found.content
    upstream.wait_until_left(left + len(upstream.asked) - asked)
    settle(proxy)


@pytest.mark.parametrize(
    ("style", "text", "finish"), [("filter", "", "content_filter"), ("refuse", "No.", "stop")]
)
def test_a_blocked_prompt_answered_as_the_llm_would(folder, upstream, style, text, finish) -> None:
    streams(upstream, chunk("Sure"), HANG)
    with proxied(folder, upstream, on_blocked_prompt=style, refusal="No.") as proxy:
        bad_prompts.add(
            proxy.run(proxy.app.state.service.stream._loaded()).engine.chat.render([BAD_USER]).prompt_end
        )
        reply = proxy.stream(messages=[BAD_USER])
        assert (reply.status, reply.text(), reply.finish(), reply.is_done) == (200, text, finish, True)
        [choice] = proxy.post({"messages": [BAD_USER]}).json()["choices"]
        assert ((choice["message"]["content"] or ""), choice["finish_reason"]) == (text, finish)


def test_nothing_is_shown_before_the_prompt_is_judged(proxy, upstream) -> None:
    """And the upstream is asked at once."""
    import threading

    launch, may_run = proxy.engine.engine.core.runner.launch, threading.Event()

    def held(batch: Any) -> Any:
        assert may_run.wait(20)
        return launch(batch)

    streams(upstream, chunk("Hello"), chunk(" you", "stop"), DONE)
    asked, found = len(upstream.asked), []
    proxy.engine.engine.core.runner.launch = held
    try:
        asking = threading.Thread(target=lambda: found.append(proxy.stream()))
        asking.start()
        while len(upstream.asked) == asked:
            pass
        asking.join(0.2)
        assert not found
    finally:
        may_run.set()
        proxy.engine.engine.core.runner.launch = launch
    asking.join(20)
    assert found[0].text() == "Hello you"
