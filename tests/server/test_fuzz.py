"""Requests made from the API's own page: every answer is one that the page promises, and none is a 500."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import REPLY, USER, FakeGen, Served, served

from guardengine.text.tokenizer import Tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.servers]


@pytest.fixture(scope="module")
def server(checkpoints) -> Iterator[Served]:
    folder = checkpoints(dtype="float32")
    tokenizer = Tokenizer.from_dir(folder)
    with served(folder, gen=lambda: FakeGen(tokenizer)) as server:
        yield server


@pytest.fixture(scope="module")
def page(server) -> Any:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def test_the_page_names_what_it_is_about(page) -> None:
    assert page.raw_schema["openapi"].startswith("3.")
    assert "/v1/moderations" in page.raw_schema["paths"]


@pytest.mark.parametrize("path", ["/v1/moderations", "/v1/guard", "/v1/chat/completions"])
@pytest.mark.parametrize("mode", [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE])
def test_answers_are_as_the_page_says(page, server, path, mode) -> None:
    operation = page[path]["POST"]
    counts: dict[int, int] = {}

    @settings(
        max_examples=25,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    @given(operation.as_strategy(generation_mode=mode))
    def check(case: Any) -> None:
        if mode == schemathesis.GenerationMode.POSITIVE:
            # What the page cannot say: which conversations there can be, and which models there are.
            case.body.pop("model", None)
            if "messages" in case.body:
                case.body["messages"] = [USER, {"role": "assistant", "content": REPLY}]
        response = case.call()
        counts[response.status_code] = counts.get(response.status_code, 0) + 1
        assert response.status_code != 500, response.text
        assert response.headers["content-type"][0].startswith(("application/json", "text/event-stream"))
        if response.status_code == 200 and not is_streamed(case):
            case.validate_response(response, checks=[schemathesis.checks.response_schema_conformance])
        elif response.status_code != 200:
            error = response.json()["error"]
            assert set(error) == {"message", "type", "param", "code"}

    check()
    assert counts.get(200, 0) > 0 or mode == schemathesis.GenerationMode.NEGATIVE, counts
    with server.http() as http:
        assert http.get("/health").status_code == 200


def is_streamed(case: Any) -> bool:
    return isinstance(case.body, dict) and bool(case.body.get("stream"))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=10,
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from(["/v1/moderations", "/v1/guard", "/v1/chat/completions"]),
    JSON.map(json.dumps).map(str.encode) | st.binary(max_size=60),
    st.sampled_from(
        ["application/json", "text/plain", "", "application/x-www-form-urlencoded", "multipart/form-data"]
    ),
)
def test_no_body_breaks_the_server(server, path, body, kind) -> None:
    with server.http() as http:
        response = http.post(path, content=body, headers={"content-type": kind})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["code"] in ("invalid_json", "invalid_request", "unsupported_content")
