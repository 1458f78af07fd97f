"""A guardrail for LiteLLM's proxy: prompts before or beside the LLM's call, replies while they stream.

    guardrails:
      - guardrail_name: guardengine
        litellm_params:
          guardrail: guardengine.integrations.litellm.GuardEngineGuardrail
          mode: [pre_call, post_call]        # during_call: beside the LLM's call instead of before it
          default_on: true
          api_base: http://127.0.0.1:8000    # guardengine serve; or checkpoint: FOLDER, for an engine in the proxy
          api_key: os.environ/GUARDENGINE_API_KEY

Streams of chat completions go through `async_post_call_streaming_iterator_hook`, token by token. For its other
endpoints (/v1/messages, /v1/responses, ...) the proxy calls `apply_guardrail` with texts, and with whole streams.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from litellm.exceptions import GuardrailRaisedException
from litellm.integrations.custom_guardrail import CustomGuardrail, log_guardrail_information
from litellm.types.utils import Delta, ModelResponseStream, StreamingChoices

from guardengine.errors import Blocked, ConfigError, GuardEngineError, InvalidText, Overloaded, ServerError
from guardengine.integrations.guard import Guard
from guardengine.integrations.judges import Messages
from guardengine.integrations.openai import chunk_text, message_text, split_chunk, text_messages
from guardengine.labels import Verdict
from guardengine.policy import Policy

if TYPE_CHECKING:
    from guardengine.engine.async_engine import AsyncEngine

OnBlock = Literal["content_filter", "raise"]


class GuardEngineGuardrail(CustomGuardrail):
    """A CustomGuardrail of LiteLLM's proxy. Its options may stand in the proxy's YAML.

    A conversation that cannot be judged (too long, not text) is refused with status 400; when the guard cannot be
    reached the status is 503.
    """

    def __init__(
        self,
        api_base: str | None = None,
        api_key: str | None = None,
        *,
        checkpoint: str | None = None,
        engine_options: Mapping[str, Any] | None = None,
        engine: AsyncEngine | None = None,
        policy: Policy | Mapping[str, Any] | None = None,
        on_block: OnBlock = "content_filter",
        substitute: str | None = None,
        unreachable_fallback: Literal["fail_closed", "fail_open"] = "fail_closed",
        timeout: float | None = None,
        reconnect_s: float = 2.0,
        skip_media: bool = False,
        **options: Any,
    ) -> None:
        """Make the guardrail from one of api_base, checkpoint and engine.

        Args:
            api_base: The address of a running `guardengine serve`.
            api_key: A key that this server accepts.
            checkpoint: A folder or hub id: loads an engine in the proxy's process.
            engine_options: Options of `AsyncEngine.from_pretrained` for `checkpoint`.
            engine: An AsyncEngine that was made for the proxy's event loop.
            policy: A Policy (not with api_base), or its options as a dict, with "preset": "strict" or "loose" beside
                them.
            on_block: How a stream ends when its reply is blocked after some of it was sent. "content_filter": with a
                last chunk of this finish_reason. "raise": with the error frame that the proxy makes of an exception.
                Everything else that is blocked raises GuardrailRaisedException, status 400.
            substitute: The content of that last chunk.
            unreachable_fallback: "fail_closed" refuses requests while the guard cannot be reached or has no room,
                "fail_open" lets them pass.
            timeout: Seconds that an answer of the guard may take; 10 by default.
            reconnect_s: Seconds during which a lost server is tried again.
            skip_media: Judge a request with images, audio or files by its text, instead of refusing it.
            **options: Options of CustomGuardrail.

        Raises:
            ConfigError: An option is not valid.
        """
        if on_block not in ("content_filter", "raise"):
            raise ConfigError(f"on_block={on_block!r}: choose 'content_filter' or 'raise'")
        if unreachable_fallback not in ("fail_closed", "fail_open"):
            raise ConfigError(
                f"unreachable_fallback={unreachable_fallback!r}: choose 'fail_closed' or 'fail_open'"
            )
        self.guard = Guard(
            api_base,
            api_key=api_key,
            checkpoint=checkpoint,
            engine_options=engine_options,
            engine=engine,
            policy=policy,
            timeout_s=10.0 if timeout is None else timeout,
            reconnect_s=reconnect_s,
            on_unreachable="open" if unreachable_fallback == "fail_open" else "closed",
        )
        self._on_block, self._substitute, self._skip_media = on_block, substitute, skip_media
        super().__init__(**options)

    # -- the request ---------------------------------------------------------------------------------------

    @log_guardrail_information
    async def async_pre_call_hook(
        self, user_api_key_dict: Any, cache: Any, data: dict[str, Any], call_type: str
    ) -> dict[str, Any]:
        """Judge a request before the LLM is called. Called by the proxy."""
        await self._judge_request(data)
        return data

    @log_guardrail_information
    async def async_moderation_hook(
        self, data: dict[str, Any], user_api_key_dict: Any, call_type: str
    ) -> dict[str, Any]:
        """Judge a request while the LLM is being called. Called by the proxy."""
        await self._judge_request(data)
        return data

    # -- the response --------------------------------------------------------------------------------------

    @log_guardrail_information
    async def async_post_call_success_hook(
        self, data: dict[str, Any], user_api_key_dict: Any, response: Any
    ) -> Any:
        """Judge every choice of a finished completion as the reply to its request. Called by the proxy."""
        replies = [
            message_text(getattr(choice, "message", None)) or getattr(choice, "text", None)
            for choice in getattr(response, "choices", None) or ()
        ]
        await self._judge_replies(self._messages(data), replies)
        return response

    async def async_post_call_streaming_iterator_hook(
        self, user_api_key_dict: Any, response: Any, request_data: dict[str, Any]
    ) -> AsyncGenerator[Any, None]:
        """Pass on the chunks whose text is cleared. When the reply is blocked, end the stream and close the LLM's.
        Called by the proxy."""
        last: Any = None
        shown = self.guard.show(
            response, self._messages(request_data), text=self._text, split=split_chunk, check_prompt="beside"
        )
        try:
            async for chunk in shown:
                last = chunk
                yield chunk
        except Blocked as blocked:
            if last is None or self._on_block == "raise":
                raise self._error(blocked) from None
            yield ModelResponseStream(
                id=last.id,
                created=last.created,
                model=last.model,
                choices=[
                    StreamingChoices(
                        index=0, delta=Delta(content=self._substitute), finish_reason="content_filter"
                    )
                ],
            )
        except GuardEngineError as error:
            raise self._error(error) from None
        finally:
            await shown.aclose()

    # -- texts ---------------------------------------------------------------------------------------------

    async def apply_guardrail(
        self,
        inputs: Any = None,
        request_data: dict[str, Any] | None = None,
        input_type: Literal["request", "response"] = "request",
        logging_obj: Any = None,
        **older: Any,
    ) -> Any:
        """Judge the texts that the proxy took out of a request or a response, and return them unchanged. Called by the
        proxy.

        Older releases call `apply_guardrail(text, language, entities, request_data)` and expect the text back.
        """
        if inputs is None or isinstance(inputs, str):
            text = older.get("text", "") if inputs is None else inputs
            await self._judge_prompts([text])
            return text
        texts = list(inputs.get("texts") or ())
        if input_type == "request":
            if messages := inputs.get("structured_messages"):
                await self._judge([(self._plain(messages), None)])
            else:
                await self._judge_prompts(texts)
            return inputs
        calls = [message_text({"tool_calls": [call]}) for call in inputs.get("tool_calls") or ()]
        await self._judge_replies(self._messages(request_data or {}), [*texts, *calls])
        return inputs

    # -- inside --------------------------------------------------------------------------------------------

    async def _judge_request(self, data: Mapping[str, Any]) -> None:
        if _conversation(data):
            await self._judge([(self._messages(data), None)])
        else:
            await self._judge_prompts(self._texts(data))

    async def _judge_prompts(self, texts: Sequence[str]) -> None:
        await self._judge([([{"role": "user", "content": text}], None) for text in texts])

    async def _judge_replies(self, messages: Messages, replies: Sequence[str | None]) -> None:
        await self._judge([(messages, reply) for reply in replies if reply])

    async def _judge(self, conversations: Sequence[tuple[Messages, str | None]]) -> None:
        """Judge conversations concurrently, so that they share steps. Raises the error of the first that is blocked."""
        try:
            verdicts = await asyncio.gather(
                *(self.guard.judge(messages, reply) for messages, reply in conversations)
            )
        except GuardEngineError as error:
            raise self._error(error) from None
        for verdict in verdicts:
            if verdict.action == "block":
                raise self._error(Blocked.by(verdict))

    def _messages(self, data: Mapping[str, Any]) -> Messages:
        """The conversation in a request."""
        if messages := _conversation(data):
            return self._plain(messages)
        return [{"role": "user", "content": "\n".join(self._texts(data))}]

    def _plain(self, messages: Sequence[Any]) -> Messages:
        try:
            return text_messages(messages, skip_media=self._skip_media)
        except GuardEngineError as error:
            raise self._error(error) from None

    def _texts(self, data: Mapping[str, Any]) -> list[str]:
        """The texts of a request that is no conversation: text completions, embeddings, speech, images."""
        given = data.get("prompt") or data.get("input") or []
        texts = [given] if isinstance(given, str) else given
        if not all(isinstance(text, str) for text in texts):
            raise self._error(InvalidText("the request has token ids, which are not Qwen3Guard's; send text"))
        return list(texts)

    @staticmethod
    def _text(chunk: Any) -> str | None:
        if not hasattr(chunk, "choices"):
            raise ConfigError(
                f"the stream has {type(chunk).__name__}, which is no chunk of a chat completion: only streams of "
                "chat completions can be guarded token by token"
            )
        return chunk_text(chunk) or getattr(next(iter(chunk.choices), None), "text", None)

    def _error(self, error: GuardEngineError) -> GuardrailRaisedException:
        """The exception from which the proxy makes its answer."""
        raised = GuardrailRaisedException(
            guardrail_name=self.guardrail_name, message=str(error), should_wrap_with_default_message=False
        )
        # Set as attributes, because __init__ of older releases does not have these arguments.
        raised.status_code = 503 if isinstance(error, ServerError | Overloaded) else 400
        raised.blocked_content = isinstance(error, Blocked)
        verdict: Verdict | None = getattr(error, "verdict", None)
        raised.verdict = verdict
        return raised


def _conversation(data: Mapping[str, Any]) -> Sequence[Any]:
    """The messages of a request; /v1/responses calls them input."""
    given = data.get("messages") or data.get("input")
    is_list = isinstance(given, list) and all(isinstance(message, Mapping) for message in given)
    return given if is_list and given else []
