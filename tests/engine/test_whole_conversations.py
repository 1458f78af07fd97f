"""moderate_many of both engines: unfit conversations, spans, tenants and deadlines."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from launching import Launches, lenient, same, sync_engine, with_engine

from guardengine import AsyncEngine, Moderation
from guardengine.errors import ConfigError, InvalidText, InvalidTokens, Overloaded, StreamTooLong

pytestmark = pytest.mark.slow

USER = {"role": "user", "content": "Where?"}
REPLY = "The capital is Paris (巴黎是法国的首都)，n'est-ce pas?\n\n```py\nprint('cafe\u0301')\n```\n👩‍👩‍👧 It's done."


def says(text: str, **more: str) -> list[dict[str, str]]:
    return [USER, {"role": "assistant", "content": text, **more}]


UNFIT: list[tuple[Any, type[Exception]]] = [
    ([{"role": "user", "content": "word " * 600}], StreamTooLong),
    ([{"role": "user", "content": "a" * 10**6}], StreamTooLong),
    (says("word " * 600), StreamTooLong),
    (says("word " * 10_000), StreamTooLong),
    ([], InvalidText),
    ("text", InvalidText),
    ([USER, "text"], InvalidText),
    ([{"role": "nobody", "content": "x"}], InvalidText),
    (says("\ud800"), InvalidText),
    ([USER, {"role": "system", "content": "x"}], InvalidText),
]


def alike(found: Moderation, other: Moderation) -> bool:
    return (
        same(found.labels, other.labels)
        and (found.prompt is None) == (other.prompt is None)
        and (found.prompt is None or same([found.prompt], [other.prompt]))  # type: ignore[list-item]
        and (found.response, found.verdict, found.spans) == (other.response, other.verdict, other.spans)
        and (found.num_tokens, found.is_complete) == (other.num_tokens, other.is_complete)
    )


@pytest.mark.parametrize("spans", [False, True])
def test_unfit_ones_are_returned_in_their_places(folder, spans) -> None:
    """In one call, and nothing of them is computed; else the first of them is raised before anything is."""
    fit = [[USER], says(REPLY), says("", reasoning_content="Hm.")]
    talks = [each for bad, _ in UNFIT for each in (bad, *fit)]
    kinds = [kind for _, kind in UNFIT]

    def check(found: list[Any]) -> None:
        assert [type(each) for each in found[::4]] == kinds
        assert not any("conversations" in str(each) for each in found[::4])
        for start in range(1, len(found), 4):
            assert all(alike(*pair) for pair in zip(found[start : start + 3], expected, strict=True))

    with sync_engine(folder) as engine:
        expected = engine.moderate_many(fit, spans=spans)
        num_tokens = engine.stats()["tokens_computed"]
        for bad, kind in UNFIT:
            with pytest.raises(kind, match=r"^conversations\[2\]: "):
                engine.moderate_many([*fit[:2], bad, *fit], spans=spans)
            assert engine.stats()["tokens_computed"] == num_tokens
        check(engine.moderate_many(talks, spans=spans, on_unfit="return"))
        assert engine.moderate_many([], on_unfit="return") == []

    async def use(engine: AsyncEngine, launches: Launches) -> None:
        with pytest.raises(InvalidTokens, match=r"^conversations\[1\]: "):
            await engine.moderate_many([[USER], [], [USER]], spans=spans)
        with pytest.raises(StreamTooLong, match=r"^conversations\[1\]: "):
            await engine.moderate_many([[USER], UNFIT[0][0]], spans=spans)
        assert launches.num_computed == 0
        check(await engine.moderate_many(talks, spans=spans, on_unfit="return"))

    with_engine(folder, use)


@given(st.lists(st.booleans(), max_size=12))
@settings(max_examples=10, deadline=None)
def test_the_others_are_answered_in_order(whole_engine, fits: list[bool]) -> None:
    talks = [[{"role": "user", "content": "a " * (3 + i)}] if fit else [] for i, fit in enumerate(fits)]
    found = whole_engine.moderate_many(talks, on_unfit="return")
    assert [isinstance(each, Moderation) for each in found] == fits
    lengths = [each.num_tokens for each in found if isinstance(each, Moderation)]
    assert lengths == sorted(set(lengths))


@pytest.fixture(scope="module")
def whole_engine(folder) -> Any:
    with sync_engine(folder) as engine:
        yield engine


@pytest.mark.parametrize("text", [REPLY, "\n\n" + REPLY, "x"])
def test_spans_are_places_in_the_content(folder, text) -> None:
    with sync_engine(folder) as engine:
        with engine.open([USER], policy=lenient()) as stream:
            stream.append_text(text.lstrip("\n"), is_final=True)
            engine.run()
            places = [stream.span(label) for label in stream.labels]
            token_ids = stream.token_ids
        plain, found = (engine.moderate_many([says(text)], spans=spans)[0] for spans in (False, True))
        assert plain.spans is None
        assert found.num_tokens == len(token_ids)
        assert [label.token_id for label in found.labels] == token_ids[-len(found.labels) :]
        assert same(plain.labels, found.labels)
        skipped = len(text) - len(text.lstrip("\n"))
        assert found.spans == [tuple(place + skipped for place in span) for span in places]
        assert text[found.spans[0].start_char] == text.lstrip("\n")[0]
        data = text.encode()
        for span in found.spans:
            assert data[span.start_byte : span.end_byte].decode() == text[span.start_char : span.end_char]
        for talk in (says("x", reasoning_content="Hm."), says("<think>\nHm.\n</think>\n\nx"), says("  x")):
            [thought] = engine.moderate_many([talk], spans=True)
            assert thought.spans == [None] * len(thought.labels)
        assert engine.moderate_many([[USER]], spans=True)[0].spans == []


def test_a_tenant_has_its_limits(folder) -> None:
    talks = [says(REPLY)] * 5

    async def use(engine: AsyncEngine, _: Launches) -> None:
        everybodys = await engine.moderate_many(talks, tenant="a")
        async with await engine.open([USER], tenant="a"):
            with pytest.raises(Overloaded, match="max_streams_per_tenant"):
                await engine.moderate_many(talks, tenant="a")
            found = await engine.moderate_many(talks, tenant="b")
            assert all(same(one.labels, other.labels) for one, other in zip(found, everybodys, strict=True))

    with_engine(folder, use, max_streams_per_tenant=1)
    with sync_engine(folder, max_streams_per_tenant=1) as engine, engine.open([USER], tenant="a"):
        with pytest.raises(Overloaded, match="max_streams_per_tenant"):
            engine.moderate_many(talks, tenant="a")
        assert len(engine.moderate_many(talks, tenant="b")) == 5


def test_what_is_late_goes_unjudged(folder) -> None:
    async def use(engine: AsyncEngine, launches: Launches) -> None:
        [in_time] = await engine.moderate_many([says(REPLY)], lenient(), timeout_s=20)
        assert (in_time.is_complete, in_time.verdict.rule) == (True, "none")
        launches.hold()
        call = asyncio.create_task(engine.moderate_many([says(REPLY), [USER]], lenient(), timeout_s=0.05))
        await launches.until_held()
        for late in await asyncio.wait_for(call, 10):
            assert not late.is_complete
            assert (late.verdict.action, late.verdict.rule) == ("block", "timeout")
            assert late.response == late.verdict
        launches.may_run.set()

    with_engine(folder, use)


def test_options_that_are_wrong(folder) -> None:
    with sync_engine(folder) as engine:
        for options in ({"on_unfit": "drop"}, {"mode": "choice"}, {"timeout_s": -1.0}):
            with pytest.raises(ConfigError):
                engine.moderate_many([[USER]], **options)
        with pytest.raises(InvalidText, match="list of message lists"):
            engine.moderate_many("text", on_unfit="return")  # type: ignore[arg-type]


def test_an_engine_says_what_it_is(folder) -> None:
    with sync_engine(folder) as sync:
        info, heads = sync.info, sync.core.readout.columns
        assert (info.kind, info.max_model_len, info.reads_text) == ("stream", 512, True)
        assert info.risks == tuple(heads["assistant"].risks)
        assert info.categories == {role: tuple(heads[role].categories) for role in ("user", "assistant")}

    async def use() -> None:
        engine = AsyncEngine(lambda: sync_engine(folder))
        with pytest.raises(ConfigError, match="not loaded yet"):
            _ = engine.info
        async with engine:
            assert engine.info == info

    asyncio.run(use())
