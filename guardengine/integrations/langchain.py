"""A chat model for LangChain that guards another one: in chains, in agents, wherever a chat model can be used.

    model = GuardedChatModel(model=ChatOpenAI(...), guard=Guard("http://127.0.0.1:8000"))
    async for chunk in model.astream("Where?"):
        ...
    agent = create_agent(model, tools=[...])

It is a model and not an agent's middleware, because middleware sees finished messages only, when the reader already
has their tokens. Needs langchain-core.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from typing import Any, Literal

from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, convert_to_openai_messages
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable, RunnableBinding

from guardengine.errors import Blocked, ConfigError
from guardengine.integrations.guard import Guard
from guardengine.integrations.openai import text_messages
from guardengine.integrations.own_loop import in_loop


class GuardedChatModel(BaseChatModel):
    """A chat model that judges the prompt before the guarded model is called, and the reply while it streams.

    The guarded model's own callbacks, cache and rate limiter are not used: set them on this model. Synchronous calls
    run in an event loop of this module. A Guard with a url can be used from any loop; a Guard with an engine either
    for asynchronous calls of one loop, or for synchronous calls.

    Attributes:
        model: The chat model to guard.
        guard: A `guardengine.integrations.guard.Guard`.
        on_block: "stop" ends the reply after the text that was cleared, with finish_reason "content_filter" in the
            response's metadata; "raise" raises `Blocked`.
        substitute: With "stop", a text that takes the place of what was blocked. None: nothing.
        skip_media: Judge a conversation with images, audio or files by its text, instead of refusing it.

    Raises:
        ConfigError: `guard` is not a Guard. Calls raise the errors of `Guard.judge` and `Guard.show`.
    """

    model: BaseChatModel
    guard: Any
    on_block: Literal["stop", "raise"] = "stop"
    substitute: str | None = None
    skip_media: bool = False

    def model_post_init(self, context: Any) -> None:
        super().model_post_init(context)
        if not isinstance(self.guard, Guard):
            raise ConfigError(
                f"guard is {type(self.guard).__name__}, not a Guard: pass one of guardengine.integrations.guard"
            )

    @property
    def _llm_type(self) -> str:
        return f"guarded-{self.model._llm_type}"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return dict(self.model._identifying_params)

    def bind_tools(self, tools: Sequence[Any], **kwargs: Any) -> Runnable[Any, AIMessage]:
        """Bind tools in the form that the guarded model needs.

        Args:
            tools: The tools, in any form that the guarded model takes.
            **kwargs: Further arguments of its `bind_tools`.

        Raises:
            ConfigError: The guarded model's `bind_tools` does not return a RunnableBinding.
        """
        bound = self.model.bind_tools(tools, **kwargs)
        if not isinstance(bound, RunnableBinding):
            raise ConfigError(
                f"{type(self.model).__name__}.bind_tools returns no RunnableBinding; use a model whose does"
            )
        return self.bind(**bound.kwargs)

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: Any = None,
        **kwargs: Any,
    ) -> ChatResult:
        talk = self._talk(messages)
        verdict = await self.guard.judge(talk)
        if verdict.action == "block":
            return ChatResult(generations=[self._instead(Blocked.by(verdict))])
        result = await self.model._agenerate(messages, stop=stop, **kwargs)
        generations: list[ChatGeneration] = []
        for generation in result.generations:
            verdict = await self.guard.judge(talk, _text(generation))
            is_blocked = verdict.action == "block"
            generations.append(self._instead(Blocked.by(verdict)) if is_blocked else generation)
        return ChatResult(generations=generations, llm_output=result.llm_output)

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: Any = None,
        **kwargs: Any,
    ) -> AsyncGenerator[ChatGenerationChunk, None]:
        source = self._source(messages, stop, **kwargs)
        shown = self.guard.show(source, self._talk(messages), text=_text, split=_split)
        try:
            async for chunk in shown:
                yield chunk
        except Blocked as blocked:
            message = self._instead(blocked).message
            yield ChatGenerationChunk(
                message=AIMessageChunk(content=message.content, response_metadata=message.response_metadata)
            )
        finally:
            await shown.aclose()

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: Any = None,
        **kwargs: Any,
    ) -> ChatResult:
        return in_loop(self._agenerate(messages, stop, **kwargs))

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: Any = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        chunks = self._astream(messages, stop, **kwargs)
        try:
            while (chunk := in_loop(_next(chunks))) is not None:
                yield chunk
        finally:
            in_loop(chunks.aclose())

    async def _source(
        self, messages: list[BaseMessage], stop: list[str] | None, **kwargs: Any
    ) -> AsyncIterator[ChatGenerationChunk]:
        kind = type(self.model)
        if kind._astream is BaseChatModel._astream and kind._stream is BaseChatModel._stream:
            result = await self.model._agenerate(messages, stop=stop, **kwargs)
            yield _as_chunk(result.generations[0])
            return
        async for chunk in self.model._astream(messages, stop=stop, **kwargs):
            yield chunk

    def _talk(self, messages: list[BaseMessage]) -> list[dict[str, str]]:
        return text_messages(convert_to_openai_messages(messages), skip_media=self.skip_media)

    def _instead(self, blocked: Blocked) -> ChatGeneration:
        """The message that takes the place of what was blocked. Raises `blocked` with on_block="raise"."""
        if self.on_block == "raise":
            raise blocked
        verdict = {name: getattr(blocked.verdict, name) for name in ("risk", "category", "rule")}
        metadata = {"finish_reason": "content_filter", "guardengine": verdict}
        return ChatGeneration(message=AIMessage(content=self.substitute or "", response_metadata=metadata))


def _text(generation: ChatGeneration) -> str:
    """Everything in a message or chunk that a reader or a tool gets: reasoning, content, names and arguments of tool
    calls."""
    message: Any = generation.message
    text = str(message.additional_kwargs.get("reasoning_content") or "")
    for block in [message.content] if isinstance(message.content, str) else message.content:
        if isinstance(block, str):
            text += block
        else:
            text += next(
                (t for n in ("text", "reasoning", "thinking") if isinstance(t := block.get(n), str)), ""
            )
    calls = getattr(message, "tool_call_chunks", None) or message.tool_calls
    for call in calls:
        arguments = call.get("args") or ""
        text += (call.get("name") or "") + (
            arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        )
    return text


def _split(
    chunk: ChatGenerationChunk, num_chars: int
) -> tuple[ChatGenerationChunk, ChatGenerationChunk] | None:
    """Cut a chunk that has only content in two; None for other chunks."""
    content = chunk.message.content
    if not isinstance(content, str) or _text(chunk) != content:
        return None
    rest = chunk.message.model_copy(update={"content": content[num_chars:]})
    first = AIMessageChunk(content=content[:num_chars], id=chunk.message.id)
    return ChatGenerationChunk(message=first), ChatGenerationChunk(
        message=rest, generation_info=chunk.generation_info
    )


def _as_chunk(generation: ChatGeneration) -> ChatGenerationChunk:
    """A finished message as a stream of one chunk."""
    message: Any = generation.message
    calls: Any = [
        {"name": call["name"], "args": json.dumps(call["args"]), "id": call["id"], "index": index}
        for index, call in enumerate(message.tool_calls)
    ]
    fields = {
        name: getattr(message, name) for name in ("content", "id", "additional_kwargs", "usage_metadata")
    }
    chunk = AIMessageChunk(**fields, response_metadata=message.response_metadata, tool_call_chunks=calls)
    return ChatGenerationChunk(message=chunk, generation_info=generation.generation_info)


async def _next(chunks: AsyncGenerator[ChatGenerationChunk, None]) -> ChatGenerationChunk | None:
    return await anext(chunks, None)
