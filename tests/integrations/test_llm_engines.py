"""vLLM's AsyncLLM and SGLang's Engine under `guarded`: fakes with their signatures, as neither can be installed here.

SGLang's has what was read in sglang 0.5.23's sources: parameters, what outputs repeat, who shares a list, and that
closing its generator ends nothing. vLLM's has the signatures of its documentation; its sources were not at hand.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from guarding import BAD_USER, make_bombs_unsafe, opened

from guardengine import AsyncEngine, guarded
from guardengine.errors import ConfigError
from guardengine.integrations import sglang, vllm

WORDS = ["Sure,", " here", " it", " is:", " take", " a", " bomb", " and", " some", " patience."]
SAFE = [*WORDS[:6], " walk", *WORDS[7:]]


class AsyncLLM:
    """vLLM's, as far as it goes."""

    def __init__(self, words: list[str]) -> None:
        self.words, self.aborted, self.submitted = words, list[str](), list[str]()

    async def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, *, priority: int = 0
    ) -> AsyncIterator[Any]:
        self.submitted.append(request_id)
        for word in self.words:
            yield SimpleNamespace(request_id=request_id, outputs=[SimpleNamespace(text=word, token_ids=[1])])
            await asyncio.sleep(0)

    async def abort(self, request_id: Any, internal: bool = False) -> None:
        self.aborted.append(request_id)


class Engine:
    """SGLang's. Intermediate outputs of one that is not incremental share one list of ids."""

    def __init__(self, words: list[str], ids: list[int], incremental: bool = False) -> None:
        self.words, self.ids, self.incremental = words, ids, incremental
        self.tokenizer_manager = self
        self.aborted: list[str] = []
        self.requests: list[dict[str, Any]] = []

    async def async_generate(
        self,
        prompt: Any = None,
        sampling_params: Any = None,
        input_ids: Any = None,
        stream: bool = False,
        rid: str | None = None,
        priority: int | None = None,
    ) -> AsyncIterator[dict[str, Any]]:
        self.requests.append(
            {"prompt": prompt, "sampling_params": sampling_params, "input_ids": input_ids, "rid": rid}
        )
        assert stream
        return self._outputs(rid)

    async def _outputs(self, rid: Any) -> AsyncIterator[dict[str, Any]]:
        text, ids = "", list[int]()
        for index, (word, token_id) in enumerate(zip(self.words, self.ids, strict=True)):
            text, ids[len(ids) :] = text + word, [token_id]
            is_last = index == len(self.words) - 1
            meta = {"id": rid, "finish_reason": {"type": "stop"} if is_last else None}
            if self.incremental:
                yield {"text": word, "output_ids": [token_id], "meta_info": meta}
            else:
                yield {"text": text, "output_ids": ids.copy() if is_last else ids, "meta_info": meta}
            await asyncio.sleep(0)

    def abort_request(self, rid: str = "", abort_all: bool = False) -> None:
        self.aborted.append(rid)


@pytest.fixture
def run(checkpoints, monkeypatch) -> Any:
    async def main(use: Any) -> Any:
        async with AsyncEngine.from_pretrained(
            checkpoints(dtype="float32"), num_threads=1, kv_cache_bytes=2**25
        ) as engine:
            tokenizer = engine.engine.chat.tokenizer
            make_bombs_unsafe(monkeypatch, tokenizer)
            return await asyncio.wait_for(use(engine, tokenizer), 30)

    return lambda use: asyncio.run(main(use))


async def joined(pieces: Any) -> str:
    return "".join([piece async for piece in pieces])


def test_vllms_request_is_aborted_on_a_block_only(run) -> None:
    async def use(engine: Any, tokenizer: Any) -> None:
        llm = AsyncLLM(SAFE)
        outputs = vllm.generate(llm, "p", None, "r1", priority=1)
        found = await joined(guarded(outputs, await opened(engine), text=vllm.delta_text))
        assert (found, llm.aborted) == ("".join(SAFE), [])
        llm = AsyncLLM([*WORDS, *SAFE * 20])
        outputs = vllm.generate(llm, "p", None, "r2")
        found = await joined(
            guarded(outputs, await opened(engine), text=vllm.delta_text, substitute=" [removed]")
        )
        assert (found, llm.aborted) == ("".join(WORDS[:6]) + " [removed]", ["r2"])
        llm = AsyncLLM(SAFE)
        outputs = vllm.generate(llm, "p", None, "r3")
        assert await joined(guarded(outputs, await opened(engine, BAD_USER), text=vllm.delta_text)) == ""
        assert (llm.submitted, llm.aborted) == ([], [])  # there was nothing to abort

    run(use)


@pytest.mark.slow
@pytest.mark.parametrize("incremental", [False, True])
@pytest.mark.parametrize("yields", ["text", "ids"])
def test_sglangs_request_is_aborted_on_a_block_only(run, incremental, yields) -> None:
    async def use(engine: Any, tokenizer: Any) -> None:
        def llm(words: list[str]) -> Engine:
            ids = [token_id for word in words for token_id in tokenizer.encode_text(word)]
            assert len(ids) == len(words)
            return Engine(words, ids, incremental)

        def deltas(llm: Engine, **options: Any) -> Any:
            return sglang.deltas(
                llm, "p", {"max_new_tokens": 9}, incremental=incremental, yields=yields, **options
            )

        def flat(pieces: list[Any]) -> str:
            if yields == "text":
                return "".join(pieces)
            return tokenizer.decode([token_id for ids in pieces for token_id in ids])

        words = [word for word in SAFE if len(tokenizer.encode_text(word)) == 1]
        safe = llm(words)
        found = [piece async for piece in guarded(deltas(safe, priority=2), await opened(engine))]
        assert (flat(found), safe.aborted) == ("".join(words), [])
        assert safe.requests[0]["sampling_params"] == {"max_new_tokens": 9}
        bad = llm([*words, " bomb", *words * 20])
        found = [piece async for piece in guarded(deltas(bad, rid="mine"), await opened(engine))]
        assert (flat(found), bad.aborted) == ("".join(words), ["mine"])
        first = llm(words)
        pieces = guarded(deltas(first), await opened(engine))
        await anext(pieces)
        await pieces.aclose()  # a reader who leaves
        assert first.aborted in ([], [first.requests[0]["rid"]])  # [] if all had been pulled by then

    run(use)


def test_sglang_is_asked_for_one_reply() -> None:
    for arguments, options in (
        ((["p", "q"],), {}),
        ((), {"input_ids": [[1], [2]]}),
        (("p", {"n": 2}), {}),
        (("p",), {"yields": "logits"}),
    ):
        with pytest.raises(ConfigError):
            asyncio.run(joined(sglang.deltas(Engine([], []), *arguments, **options)))
