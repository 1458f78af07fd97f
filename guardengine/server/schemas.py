"""Requests and answers of the HTTP API as pydantic models. They check requests, and they are the API's description.

They check form only. Which texts, roles and names are valid is checked by the engine.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from guardengine.errors import ConfigError
from guardengine.policy import Policy
from guardengine.server.refusals import Refusal

Probability = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=200)]
ActionName = Literal["flag", "block"]
OnFailureName = Literal["closed", "open"]
TimeoutS = Annotated[
    float, Field(gt=0, le=3600, description="Seconds; the policy says what becomes of what is late.")
]


class Strict(BaseModel):
    """Unknown keys are refused: a misspelt option must not pass for its default."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Tolerant(BaseModel):
    """Unknown keys are ignored, as clients of OpenAI's API expect."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


class PolicyOptions(Strict):
    """Options of the policy that turns labels into a verdict: see guardengine.Policy."""

    preset: Literal["strict", "loose"] = Field("strict", description="loose: Controversial counts as safe.")
    risk_thresholds: dict[str, Probability] | None = None
    category_thresholds: dict[str, Probability] | None = None
    ignored_categories: list[str] | None = None
    action: ActionName | None = None
    actions: dict[str, ActionName] | None = None
    rule: Literal["report", "eval-compat"] | None = None
    debounce: Annotated[int, Field(ge=1, le=2**20, strict=True)] | None = None
    hold_back: Annotated[int, Field(ge=0, le=2**20, strict=True)] | None = None
    on_error: OnFailureName | None = None
    on_timeout: OnFailureName | None = None
    on_overload: OnFailureName | None = None

    def policy(self) -> Policy:
        """Raises Refusal, 400, for options that contradict each other."""
        try:
            return Policy.of(**self.model_dump(exclude_none=True))
        except ConfigError as error:
            raise Refusal(400, str(error), "invalid_option", param="policy") from None


class Part(Tolerant):
    """A part of a content. Only text can be judged."""

    type: str
    text: str | None = None


class ChatMessage(BaseModel):
    """A message as in OpenAI's chat API. Its other fields must be text, because the chat template reads them."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    role: Literal["system", "user", "assistant", "tool"]
    content: str | list[Part] | None = None


Messages = Annotated[list[ChatMessage], Field(min_length=1)]


class ModerationRequest(Tolerant):
    input: str | list[str] | list[Part]
    model: str | None = None
    taxonomy: Literal["qwen", "openai"] | None = Field(
        None, description="Names of categories; the server's default if left out."
    )
    policy: PolicyOptions | None = None


class ModerationResult(BaseModel):
    flagged: bool
    categories: dict[str, bool]
    category_scores: dict[str, float]
    category_applied_input_types: dict[str, list[str]]
    risk: str
    category: str = Field(description="The likeliest one; means something where risk is not Safe.")
    risk_probs: dict[str, float | None]
    category_probs: dict[str, float | None]


class ModerationResponse(BaseModel):
    id: str
    model: str
    results: list[ModerationResult]


class GuardRequest(Strict):
    messages: Messages
    model: str | None = None
    policy: PolicyOptions | None = None
    labels: Literal["all", "flagged", "none"] = Field(
        "all", description="Which tokens of the reply are listed."
    )
    timeout_s: TimeoutS | None = None


class SpanModel(BaseModel):
    start_char: int
    end_char: int
    start_byte: int
    end_byte: int


class LabelModel(BaseModel):
    position: int
    token_id: int
    risk: str
    category: str
    span: SpanModel | None = None
    risk_probs: dict[str, float | None]
    category_probs: dict[str, float | None]


class VerdictModel(BaseModel):
    action: Literal["allow", "flag", "block"]
    risk: str
    category: str | None
    position: int | None
    rule: str
    cleared: int


class FlaggedModel(BaseModel):
    risk: str
    category: str
    position: int
    num_tokens: int
    span: SpanModel | None


class ReplyModel(BaseModel):
    verdict: VerdictModel
    labels: list[LabelModel]
    flagged: list[FlaggedModel]


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class GuardResponse(BaseModel):
    id: str
    object: Literal["guard.result"]
    created: int
    model: str
    prompt: LabelModel | None
    response: ReplyModel | None
    verdict: VerdictModel
    usage: Usage


class StreamOptions(Tolerant):
    include_usage: bool = False


class ChatRequest(Tolerant):
    messages: Messages
    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(strict=True)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20, strict=True)] | None = None
    max_tokens: Annotated[int, Field(ge=1, strict=True)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, strict=True)] | None = None
    tools: list[Any] | None = None
    mode: Literal["greedy", "choice"] | None = Field(
        None, description="greedy: the text as the model writes it; choice: held to the answer's grammar."
    )
    policy: PolicyOptions | None = None


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str


class ErrorResponse(BaseModel):
    error: ErrorBody


class ModelCard(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelCard]


def plain_messages(messages: list[ChatMessage]) -> list[dict[str, Any]]:
    """Messages in the form that the engine takes, each content as one text. Raises Refusal, 400, for content that is
    not text."""
    plain = []
    for index, message in enumerate(messages):
        extra = {
            name: value for name, value in (message.model_extra or {}).items() if value not in (None, [], {})
        }
        for name, value in extra.items():
            if not isinstance(value, str):
                raise Refusal(
                    400,
                    f"messages[{index}].{name}: only text is read; put what should be judged into content",
                    "unsupported_content",
                    param=f"messages[{index}].{name}"[:200],
                )
        content = message.content
        if isinstance(content, list):
            content = joined_text(content, f"messages[{index}].content")
        plain.append({"role": message.role, "content": content, **extra})
    return plain


def joined_text(parts: list[Part], where: str) -> str:
    """The parts of one content as one text, joined by line breaks like in vLLM. Raises Refusal, 400, for parts that
    are not text."""
    for index, part in enumerate(parts):
        if part.type not in ("text", "input_text") or part.text is None:
            raise Refusal(
                400,
                f"{where}[{index}] has type {part.type!r:.40}: Qwen3Guard reads text only; send {{'type': 'text', "
                "'text': ...}",
                "unsupported_content",
                param=f"{where}[{index}]",
            )
    if not parts:
        raise Refusal(400, f"{where} is empty; a text is needed", "invalid_text", param=where)
    return "\n".join(part.text or "" for part in parts)
