"""The pages for people, without a browser: who gets them, what they may load, and the rules the page decides by."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from policy_cases import cases_and_verdicts
from serving import Served, served

from guardengine.cli import main
from guardengine.errors import ConfigError
from guardengine.server import ApiKey, ServerSettings

pytestmark = pytest.mark.servers

KEY = "a-key/with=what+openssl~makes=="
UPSTREAM = "http://127.0.0.1:8001/v1"
PAGE = files("guardengine.server.routes").joinpath("playground.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def server(checkpoints) -> Iterator[Served]:
    settings = ServerSettings(api_keys=(ApiKey.of(KEY),), playground_upstream=UPSTREAM, drain_timeout_s=2.0)
    with served(checkpoints(dtype="float32"), settings) as server:
        yield server


@pytest.fixture(scope="module")
def pages(server) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {KEY}"}
    with server.http(headers=headers) as http:
        return {path: http.get(path) for path in ("/", "/docs")}


class Elements(HTMLParser):
    """What a page is made of: elements with attributes, and the text of scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=False)
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.cdata_elem in ("script", "style"):
            self.texts.append((self.cdata_elem, data))


def directives(response: Any) -> dict[str, list[str]]:
    parts = (part.split() for part in response.headers["Content-Security-Policy"].split(";"))
    return {part[0]: part[1:] for part in parts}


# -- who gets it -------------------------------------------------------------------------------------------


def test_the_playground_needs_no_key_and_nothing_else_is_opened_with_it(server) -> None:
    with server.http() as http:
        page = http.get("/")
        assert page.status_code == 200
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert KEY not in page.text
        for path in ("/docs", "/openapi.json", "/v1/models", "/index.html", "/playground.html"):
            assert http.get(path).status_code == 401, path
        assert http.post("/").status_code == 405


def test_browsers_keys_come_as_subprotocols(server) -> None:
    def offered(key: str) -> str:
        return "guardengine.key64." + base64.urlsafe_b64encode(key.encode()).decode().rstrip("=")

    with server.socket(subprotocols=["guardengine.v1", offered(KEY)]) as page:
        assert page.subprotocol == "guardengine.v1"  # the key is not said back
    for wrong in (offered(KEY + "x"), offered(KEY)[:-1], "guardengine.key64.", "guardengine.key64.****"):
        with pytest.raises(Exception, match="401"):
            server.socket(subprotocols=["guardengine.v1", wrong])


# -- what it may load --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_pages_are_whole_and_may_load_nothing(pages, path) -> None:
    page = pages[path]
    assert page.status_code == 200
    elements = Elements(page.text)
    names = [name for name, _ in elements.found]
    assert not {"img", "iframe", "object", "embed", "base", "form", "audio", "video"} & set(names)
    for name, attributes in elements.found:
        handlers = [
            attribute for attribute in attributes if attribute.startswith("on") or attribute == "style"
        ]
        assert not handlers, (name, handlers)  # the policy would not let them work
        for attribute in ("src", "href", "action", "srcset", "xlink:href"):
            target = attributes.get(attribute) or ""
            assert "//" not in target, target
            assert attribute == "href" or not target
    assert re.findall(r"@import|\burl\(|https?://", re.sub(re.escape(UPSTREAM), "", page.text)) == []


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_the_policy_allows_these_scripts_and_styles_only(pages, path) -> None:
    policy, elements = directives(pages[path]), Elements(pages[path].text)
    assert policy["default-src"] == ["'none'"]
    for kind in ("script", "style"):
        texts = [text for name, text in elements.texts if name == kind]
        assert texts or (path, kind) == ("/docs", "script")
        hashes = [
            f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in texts
        ]
        assert policy[f"{kind}-src"] == (hashes or ["'none'"])
    for name in ("base-uri", "form-action", "frame-ancestors"):
        assert policy[name] == ["'none'"]
    assert policy["connect-src"] == (["'self'", "http://127.0.0.1:8001"] if path == "/" else ["'none'"])
    assert pages[path].headers["X-Content-Type-Options"] == "nosniff"
    assert pages[path].headers["Referrer-Policy"] == "no-referrer"


def test_without_an_upstream_the_page_may_call_its_server_only(checkpoints) -> None:
    with served(checkpoints(dtype="float32")) as server, server.http() as http:
        page = http.get("/")
        assert directives(page)["connect-src"] == ["'self'"]
        assert page.text == PAGE


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:8001",
        "ftp://host/v1",
        "http://user:password@host/v1",
        "http://host/v1?key=1",
        "http://host; script-src *",
        'http://host/v1"><script>',
        "http://host/\n",
        "http://*/v1",
        "http:///v1",
        "",
        5,
    ],
)
def test_upstreams_that_could_change_the_policy_are_refused(url) -> None:
    with pytest.raises(ConfigError, match="playground_upstream"):
        ServerSettings(playground_upstream=url)


def test_serve_refuses_them_before_it_loads_anything(capsys) -> None:
    assert main(["serve", "/nowhere", "--playground-upstream", "http://host; x"]) == 2
    assert "playground_upstream='http://host; x'" in capsys.readouterr().err


def test_the_api_page_has_all_of_it(server, pages) -> None:
    with server.http(headers={"Authorization": f"Bearer {KEY}"}) as http:
        document = http.get("/openapi.json").json()
    page = pages["/docs"].text
    for path, methods in document["paths"].items():
        for method in methods:
            assert f"{method.upper()} {path}" in page
    for name in document["components"]["schemas"]:
        assert f'id="{name}"' in page
    for target in re.findall(r'href="#([^"]+)"', page):
        assert f'id="{target}"' in page


# -- the rules ---------------------------------------------------------------------------------------------

RUN = """
const cases = JSON.parse(require("fs").readFileSync(0, "utf8"));
const found = cases.map(({ policy, labels }) => labels.map((_, i) => decide(policy, labels.slice(0, i + 1))));
process.stdout.write(JSON.stringify(found));
"""


def rules() -> str:
    found = re.search(r'<script id="rules">(.*?)</script>', PAGE, re.DOTALL)
    assert found is not None
    return found[1]


def test_the_page_decides_as_policies_do() -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed; test_playground_browser.py runs the same in Chromium")
    cases, verdicts = cases_and_verdicts(1500, seed=1)
    seen = {(verdict["action"], verdict["rule"]) for so_far in verdicts for verdict in so_far}
    assert len(seen) == 5  # nothing, and flags and blocks under both rules
    script = rules() + RUN
    run = subprocess.run(
        [node, "-e", script], input=json.dumps(cases), capture_output=True, text=True, check=True, timeout=60
    )
    for case, mine, theirs in zip(cases, verdicts, json.loads(run.stdout), strict=True):
        assert mine == theirs, case


def test_the_page_is_in_the_wheel() -> None:
    """What is no Python file must be named."""
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert "server/routes/*.html" in text
