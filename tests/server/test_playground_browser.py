"""The playground in a real Chromium, where one is installed: what people see, and that nothing but text gets in."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from policy_cases import cases_and_verdicts
from serving import REPLY, USER, Served, served, sync_engine
from upstreams import HANG, upstream

from guardengine import Policy
from guardengine.server import ApiKey, ServerSettings

pytestmark = [pytest.mark.slow, pytest.mark.servers]

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.skip("no Chromium is installed: apt-get install chromium", allow_module_level=True)
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = sync_api.expect

KEY = "a-key/with=what+openssl~makes=="
HOSTILE = '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script>"\'&lt;'


@pytest.fixture(scope="module")
def server(folder) -> Iterator[Served]:
    with served(folder, ServerSettings(drain_timeout_s=2.0)) as server:
        yield server


@pytest.fixture(scope="module")
def chromium(tmp_path_factory) -> Iterator[Any]:
    options = "disable-gpu disable-quic no-first-run disable-background-networking disable-component-update"
    arguments = [f"--{option}" for option in options.split()]
    if os.getuid() == 0:
        arguments.append("--no-sandbox")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


class Tab:
    """A page that is watched: what it asked for, what it said, what went over its WebSocket."""

    def __init__(self, chromium: Any, url: str, **options: Any) -> None:
        self.context = chromium.new_context(**options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(20_000)
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.sent: list[dict[str, Any]] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", self._hear)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: self.complaints.append("a dialog"))
        self.page.on("websocket", lambda socket: socket.on("framesent", self._note))
        self.url = url

    def _hear(self, message: Any) -> None:
        if message.type in ("error", "warning") and "401" not in message.text:
            self.complaints.append(message.text)

    def _note(self, payload: Any) -> None:
        self.sent.append(json.loads(payload))

    def open(self) -> Any:
        self.page.goto(f"{self.url}/")
        return self.page

    def judge(self, prompt: str, reply: str) -> None:
        self.page.fill("#prompt", prompt)
        self.page.fill("#reply", reply)
        self.page.click("#judge")
        self.settle()

    def settle(self) -> None:
        """Wait until the run is over."""
        expect(self.page.locator("#agreement")).not_to_be_empty()

    def labels(self) -> list[dict[str, Any]]:
        return self.page.evaluate("run.labels")  # type: ignore[no-any-return]

    def shown(self) -> str:
        """The reply as its tokens show it."""
        return "".join(self.page.locator(".token[data-index]:not(.part)").all_text_contents()).replace(
            "↵", ""
        )

    def choose(
        self, controversial: str = "block", thresholds: Any = None, debounce: int = 2, hold_back: int = 0
    ) -> None:
        self.page.check(f"[name=controversial][value={controversial}]")
        self.page.set_checked("#use-thresholds", thresholds is not None)
        for name, value in (thresholds or {}).items():
            if self.page.is_enabled(f"#t-{name.lower()}"):
                self.page.fill(f"#t-{name.lower()}", str(value))
        self.page.fill("#debounce", str(debounce))
        self.page.fill("#hold-back", str(hold_back))


@pytest.fixture
def tab(chromium, server) -> Iterator[Tab]:
    tab = Tab(chromium, server.url)
    yield tab
    assert tab.complaints == []
    assert tab.page.evaluate(
        "[window.hacked, localStorage.length, sessionStorage.length, document.cookie]"
    ) == [
        None,
        0,
        0,
        "",
    ]
    tab.context.close()


# -- judging -----------------------------------------------------------------------------------------------


def test_labels_are_the_engines_and_the_verdict_is_the_servers(tab, folder, server) -> None:
    page = tab.open()
    reply = REPLY + "\n\nAnd ꙮ."
    tab.judge(USER["content"], reply)
    with sync_engine(folder) as engine:
        found = engine.moderate([USER, {"role": "assistant", "content": reply}])
    labels = tab.labels()
    assert [(x["token_id"], x["risk"], x["risk_probs"]) for x in labels] == [
        (x.token_id, x.risk, x.risk_probs) for x in found.labels
    ]
    assert tab.shown() == reply
    classes = [
        name.split()[1]
        for name in page.locator(".token[data-index]").evaluate_all("all => all.map(e => e.className)")
    ]
    assert classes == [label.risk for label in found.labels]
    expect(page.locator("#agreement")).to_have_text("The server's verdict is the same.")
    expect(page.locator("#prompt-label")).to_contain_text(found.prompt.risk)
    expect(page.locator("#latency")).to_contain_text(
        re.compile(r"\d+ appends, in ms: [\d.]+ the last, .* for each label")
    )
    assert all(url.startswith(server.url) for url in tab.requests)
    assert {urls.removeprefix(server.url) for urls in tab.requests} == {"/", "/v1/models"}


def test_settings_decide_again_without_a_request(tab, folder) -> None:
    page = tab.open()
    tab.judge(USER["content"], REPLY)
    with sync_engine(folder) as engine:
        found = engine.moderate([USER, {"role": "assistant", "content": REPLY}])
    labels = [found.prompt, *found.labels]
    sent, requests = len(tab.sent), len(tab.requests)
    actions = set()
    for controversial, thresholds, debounce, hold_back in (
        ("block", None, 2, 0),
        ("allow", None, 1, 3),
        ("flag", {"Unsafe": 1, "Controversial": 0.5}, 1, 0),
        ("block", {"Unsafe": 0.9, "Controversial": 0.75}, 2, 0),
        ("block", {"Unsafe": 1, "Controversial": 1}, 16, 5),
        ("block", {"Unsafe": 0.99, "Controversial": 0.7}, 1, 0),
    ):
        tab.choose(controversial, thresholds, debounce, hold_back)
        options: dict[str, Any] = {"debounce": debounce, "hold_back": hold_back}
        if controversial == "flag":
            options["actions"] = {"Controversial": "flag"}
        options["risk_thresholds"] = dict(thresholds or {})
        verdict = (Policy.loose if controversial == "allow" else Policy.strict)(**options).judge(labels)
        cleared = verdict.cleared if verdict.action == "block" else len(found.labels)  # the reply is complete
        actions.add(verdict.action)
        expect(page.locator("#verdict .badge")).to_contain_text(verdict.action.upper())
        expect(page.locator("#reader")).to_have_text(
            f"A reader may see {cleared} of {len(found.labels)} tokens."
        )
        before_edge = page.locator("#tokens").evaluate(
            "box => [...box.children].findIndex(e => e.id === 'edge')"
        )
        assert before_edge == (cleared if cleared < len(found.labels) else -1)
        decides = page.locator(".token.decides").evaluate_all("all => all.map(e => Number(e.dataset.index))")
        assert decides == [i for i, label in enumerate(found.labels) if label.position == verdict.position]
    assert actions == {"allow", "flag", "block"}
    assert (len(tab.sent), len(tab.requests)) == (sent, requests)
    expect(page.locator("#agreement")).to_contain_text("Decided in this page")


def test_the_browser_decides_as_policies_do(tab) -> None:
    page = tab.open()
    cases, verdicts = cases_and_verdicts(300, seed=2)
    run = "cases => cases.map(({ policy, labels }) => labels.map((_, i) => decide(policy, labels.slice(0, i + 1))))"
    for case, mine, theirs in zip(cases, verdicts, page.evaluate(run, cases), strict=True):
        assert mine == theirs, case


def test_a_reply_is_judged_while_it_is_typed(tab, folder) -> None:
    page = tab.open()
    page.fill("#prompt", USER["content"])
    page.fill("#reply", "")
    page.check("#live")
    page.locator("#reply").press_sequentially("Sure, you take a pik ")
    expect(page.locator(".token[data-index]").first).to_be_visible()
    expect(page.locator("#tokens")).to_contain_text("take a")
    opened = [frame for frame in tab.sent if frame["type"] == "open"]
    page.locator("#reply").press_sequentially("and")
    expect(page.locator("#pending")).to_contain_text("and")  # a word that may go on is not judged yet
    assert [frame for frame in tab.sent if frame["type"] == "open"] == opened
    for _ in range(5):
        page.keyboard.press("Backspace")
    page.keyboard.type("ck.")
    expect(page.locator("#tokens")).to_contain_text("take a pick")
    page.click("#judge")
    tab.settle()
    assert tab.shown() == page.input_value("#reply") == "Sure, you take a pick."
    with sync_engine(folder) as engine:
        found = engine.moderate([USER, {"role": "assistant", "content": "Sure, you take a pick."}])
    assert [x["risk_probs"] for x in tab.labels()] == [x.risk_probs for x in found.labels]


def test_a_prompt_alone(tab) -> None:
    page = tab.open()
    tab.judge("Hello there", "")
    expect(page.locator("#prompt-label")).to_contain_text("%")
    expect(page.locator("#reader")).to_have_text("A reader may see 0 of 0 tokens.")
    expect(page.locator("#agreement")).to_have_text("The server's verdict is the same.")
    assert not tab.labels()


def test_what_the_server_refuses_is_said(tab) -> None:
    page = tab.open()
    tab.page.fill("#prompt", "a " * 9000)
    page.click("#judge")
    expect(page.locator("#error")).to_contain_text("The server says: ")
    expect(page.locator("#stop")).to_be_disabled()
    tab.judge("Hello", "Hi.")
    expect(page.locator("#error")).to_be_hidden()


def test_a_server_with_keys(chromium, folder) -> None:
    settings = ServerSettings(api_keys=(ApiKey.of(KEY),), drain_timeout_s=2.0)
    with served(folder, settings) as server:
        tab = Tab(chromium, server.url)
        page = tab.open()
        expect(page.locator("#error")).to_contain_text("no valid API key")
        page.get_by_label("API key of this server").fill(KEY)
        page.keyboard.press("Tab")
        expect(page.locator("#model")).to_have_text("qwen3guard-stream")
        tab.judge("Hello", "Hi there.")
        assert tab.shown() == "Hi there."
        assert tab.complaints == []
        assert not any(KEY in url for url in tab.requests)
        page.get_by_label("API key of this server").fill(KEY[:-1])
        page.keyboard.press("Tab")
        expect(page.locator("#model")).to_have_text("not connected")
        page.reload()
        expect(page.get_by_label("API key of this server")).to_be_visible()
        assert page.input_value("#key") == ""
        tab.context.close()


# -- text is text ------------------------------------------------------------------------------------------


def test_markup_in_prompt_and_reply_is_text(tab) -> None:
    page = tab.open()
    tab.judge(HOSTILE, HOSTILE)
    assert tab.shown() == HOSTILE
    page.locator(".token[data-index]").first.hover()
    assert page.locator("img, #tokens script").count() == 0


def test_markup_from_the_server_is_text(tab) -> None:
    page = tab.page
    probs = {"risk_probs": {"Safe": 0.1, HOSTILE: 0.9}, "category_probs": {HOSTILE: 1.0}}
    label = {"position": 5, "token_id": 1, "risk": HOSTILE, "category": HOSTILE, **probs}
    span = {"start_char": 0, "end_char": 3, "start_byte": 0, "end_byte": 3}
    verdict = {
        "action": "block",
        "risk": HOSTILE,
        "category": HOSTILE,
        "position": 5,
        "rule": "error",
        "cleared": 0,
    }
    state = {"verdict": verdict, "held_chars": 0, "cleared_chars": 0}

    def answer(socket: Any) -> None:
        def take(text: str) -> None:
            message = json.loads(text)
            stream = {"stream": message["stream"], **state}
            if message["type"] == "open":
                socket.send(json.dumps({"type": "prompt", "label": label, **stream}))
                socket.send(json.dumps({"type": "labels", "labels": [], **stream}))
            elif message["type"] == "append":
                socket.send(json.dumps({"type": "labels", "labels": [{**label, "span": span}], **stream}))
            elif message["type"] == "finish":
                error = {"message": HOSTILE, "type": HOSTILE, "param": None, "code": HOSTILE}
                socket.send(json.dumps({"type": "error", "stream": message["stream"], "error": error}))

        socket.on_message(take)

    page.route_web_socket(re.compile("/v1/guard/stream"), answer)
    tab.open()
    tab.judge("Hello", "abc")
    expect(page.locator("#error")).to_contain_text(HOSTILE)
    expect(page.locator("#verdict")).to_contain_text(
        f"{HOSTILE}, {HOSTILE}"
    )  # a failure that labels do not tell
    expect(page.locator("#prompt-label")).to_contain_text(HOSTILE)
    page.locator(".token[data-index]").hover()
    expect(page.locator("#details")).to_contain_text(HOSTILE)
    assert page.locator("main img, main script").count() == 0


# -- for everybody -----------------------------------------------------------------------------------------


def test_the_keyboard_reaches_every_token(tab) -> None:
    page = tab.open()
    tab.judge(USER["content"], REPLY)
    labels = tab.labels()
    page.focus("#prompt-label")
    expect(page.locator("#details")).to_contain_text("The prompt")
    page.keyboard.press("Tab")
    for index in range(4):
        expect(page.locator(f'.token[data-index="{index}"]')).to_be_focused()
        details = page.locator("#details")
        expect(details).to_contain_text(f"position {labels[index]['position']}")
        for probs in ("risk_probs", "category_probs"):
            for name, p in labels[index][probs].items():
                expect(details.get_by_role("row", name=f"{name} {100 * p:.1f}%")).to_be_visible()
        page.keyboard.press("ArrowRight")
    page.keyboard.press("End")
    expect(page.locator(".token[data-index]").last).to_be_focused()
    page.keyboard.press("Home")
    page.keyboard.press("n")
    hits = [i for i, label in enumerate(labels) if label["risk"] != "Safe" and i > 0]
    expect(page.locator(f'.token[data-index="{hits[0]}"]')).to_be_focused()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.name") == "controversial"  # one stop, not one a token


def test_everything_has_a_name_and_risks_have_more_than_a_colour(tab) -> None:
    page = tab.open()
    tab.judge(USER["content"], REPLY)
    unnamed = page.evaluate(
        "[...document.querySelectorAll('input, textarea, button, output')].filter(e => !(e.labels?.length || "
        "e.textContent.trim() || e.ariaLabel)).map(e => e.id)"
    )
    assert unnamed == []
    assert page.locator("#verdict").get_attribute("aria-live") == "polite"
    expect(page.locator("#verdict")).to_have_text(re.compile("ALLOW|FLAG|BLOCK"))
    for label, token in zip(tab.labels(), page.locator(".token[data-index]").all(), strict=True):
        name = token.get_attribute("aria-label")
        assert label["risk"] in name
        if label["risk"] != "Safe":
            assert label["category"] in name
            assert token.get_attribute("data-mark") == label["risk"][0]
            line = token.evaluate("e => getComputedStyle(e).textDecorationLine")
            assert line == "underline"


CONTRAST = """() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const over = (color, below) => {
    canvas.fillStyle = `rgb(${below})`; canvas.fillRect(0, 0, 1, 1);
    canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const under = (e) => (e ? over(getComputedStyle(e).backgroundColor, under(e.parentElement)) : [255, 255, 255]);
  const light = (rgb) => {
    const [r, g, b] = rgb.map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const found = [];
  for (const e of document.querySelectorAll("body *")) {
    const isText = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!isText || e.disabled || e.closest("script, [hidden], :has(> :disabled)") || !e.checkVisibility()) continue;
    const below = under(e);
    const [a, b] = [light(below), light(over(getComputedStyle(e).color, below))].sort((x, y) => y - x);
    found.push([(a + 0.05) / (b + 0.05), e.id || e.className || e.tagName, e.textContent.slice(0, 30)]);
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_is_aa_in_both_themes_and_the_button_changes_them(chromium, server, scheme) -> None:
    tab = Tab(chromium, server.url, color_scheme=scheme)
    page = tab.open()
    tab.judge(USER["content"], REPLY)
    page.locator(".token[data-index]").first.hover()
    ground = "getComputedStyle(document.body).backgroundColor"
    seen = set()
    for theme in ("system", "light", "dark"):
        expect(page.locator("#theme")).to_have_text(f"Theme: {theme}")
        contrasts = page.evaluate(CONTRAST)
        assert len(contrasts) > 50
        assert min(contrasts)[0] >= 4.5, min(contrasts)
        seen.add(page.evaluate(ground))
        page.click("#theme")
    assert len(seen) == 2
    tab.context.close()


def test_it_fits_a_phone(chromium, server) -> None:
    tab = Tab(chromium, server.url, viewport={"width": 360, "height": 740})
    page = tab.open()
    tab.judge(HOSTILE * 3, "word " * 30 + "x" * 400)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert page.locator(".reply").evaluate("box => box.scrollWidth <= box.clientWidth")
    page.locator("#debounce").scroll_into_view_if_needed()
    expect(page.locator("#verdict")).to_be_in_viewport()  # it stays where the sliders are used
    page.goto(f"{server.url}/docs")
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    tab.context.close()


def test_the_newest_token_stays_in_view(tab) -> None:
    page = tab.open()
    tab.judge(USER["content"], "Hi.")
    box = page.locator(".reply").bounding_box()
    first = page.locator(".token[data-index]").first.bounding_box()
    assert first["y"] - box["y"] < 30  # a short reply stands at the top
    tab.judge(USER["content"], "word and more, " * 200)
    expect(page.locator(".token[data-index]").last).to_be_in_viewport()
    assert page.locator(".reply").evaluate("box => box.scrollHeight > 2 * box.clientHeight")


# -- a model that replies ----------------------------------------------------------------------------------


def test_a_model_replies_and_is_stopped(chromium, folder) -> None:
    text = ["One", " two", " thr", "ee. \u2028", "Four 👩‍👩‍👧", " five."]
    with upstream(text, [*text, HANG], [500], 500) as llm:
        settings = ServerSettings(playground_upstream=llm.url + "/", drain_timeout_s=2.0)
        with served(folder, settings) as server:
            tab = Tab(chromium, server.url)
            page = tab.open()
            never = {"Unsafe": 1, "Controversial": 1}
            tab.choose(thresholds=never, debounce=1)
            page.fill("#upstream-key", "sk-of-the-llm")
            page.fill("#prompt", "Count!")
            page.click("#ask")
            tab.settle()
            assert tab.shown() == page.input_value("#reply") == "".join(text)
            expected = {
                "model": "fake-llm",
                "messages": [{"role": "user", "content": "Count!"}],
                "stream": True,
            }
            assert (llm.requests, llm.keys) == ([expected], ["Bearer sk-of-the-llm"])

            page.click("#ask")
            expect(page.locator("#tokens")).to_contain_text("five")
            assert not llm.is_left.is_set()
            tab.choose(thresholds={"Unsafe": 0, "Controversial": 0}, debounce=1)
            tab.settle()
            expect(page.locator("#verdict")).to_contain_text("BLOCK")
            assert llm.is_left.wait(10)

            tab.choose(thresholds=never, debounce=1)
            tab.complaints.clear()
            llm.replies[:] = [500]
            page.click("#ask")
            expect(page.locator("#error")).to_have_text("The model that replies answered with status 500.")
            assert all(url.startswith((server.url, llm.url)) for url in tab.requests)
            tab.context.close()


def test_a_blocked_prompt_never_reaches_the_model(chromium, folder) -> None:
    with upstream() as llm:
        settings = ServerSettings(playground_upstream=llm.url, drain_timeout_s=2.0)
        with served(folder, settings) as server:
            tab = Tab(chromium, server.url)
            page = tab.open()
            tab.choose(thresholds={"Unsafe": 0, "Controversial": 0}, debounce=1)
            page.click("#ask")
            tab.settle()
            expect(page.locator("#verdict")).to_contain_text("by the prompt")
            assert llm.requests == []
            tab.context.close()


def test_the_policy_stops_what_no_test_foresaw(tab) -> None:
    """The browser itself refuses scripts and hosts that the page's policy does not name."""
    page = tab.open()
    page.evaluate(
        "document.body.append(Object.assign(document.createElement('script'), {textContent: 'hacked = 1'}))"
    )
    assert (
        page.evaluate("fetch('http://127.0.0.1:9/').then(() => 'sent', error => error.message)")
        == "Failed to fetch"
    )
    assert any(
        "Content Security Policy" in complaint and "connect-src" in complaint for complaint in tab.complaints
    )
    tab.complaints.clear()
