"""The messages of guardengine.v1, the WebSocket protocol of docs/serving/protocol.md: parsing. Does no I/O."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, TypeAdapter, ValidationError, model_validator

from guardengine.server.refusals import Refusal
from guardengine.server.schemas import Messages, PolicyOptions, Strict, TimeoutS

PROTOCOL = "guardengine.v1"

StreamId = Annotated[str, StringConstraints(min_length=1, max_length=128)]
Id = Annotated[int, Field(ge=0, lt=2**31, strict=True)]
Ids = Annotated[list[Id], Field(max_length=2**20)]
Count = Annotated[int, Field(ge=0, lt=2**31, strict=True)]
Text = Annotated[str, StringConstraints(strict=True)]
RoleName = Literal["user", "assistant"]


class _Append(Strict):
    type: Literal["append"]
    text: Text | None = None
    token_ids: Ids | None = None
    role: RoleName = "assistant"

    @model_validator(mode="after")
    def _one_of(self) -> _Append:
        if (self.text is None) == (self.token_ids is None):
            raise ValueError("either text or token_ids is needed")
        return self


class _Finish(Strict):
    type: Literal["finish"]


class _Rollback(Strict):
    type: Literal["rollback"]
    num_tokens: Count | None = Field(None, description="How many tokens to drop.")
    to_num_tokens: Count | None = Field(None, description="How many tokens to keep, the template's included.")

    @model_validator(mode="after")
    def _one_of(self) -> _Rollback:
        if (self.num_tokens is None) == (self.to_num_tokens is None):
            raise ValueError("either num_tokens or to_num_tokens is needed")
        return self


class PastAppend(_Append):
    """An append of a stream's history."""


class PastFinish(_Finish):
    """A finish of a stream's history."""


class PastRollback(_Rollback):
    """A rollback of a stream's history."""


Past = Annotated[PastAppend | PastFinish | PastRollback, Field(discriminator="type")]


class Open(Strict):
    """Open a stream, with the history that it had on a connection that was lost, if any."""

    type: Literal["open"]
    stream: StreamId
    messages: Messages | None = None
    token_ids: Ids | None = None
    role: RoleName = "user"
    policy: PolicyOptions | None = None
    labels: Literal["all", "flagged", "none"] = "all"
    scores: bool = True
    priority: Annotated[int, Field(ge=-3, le=3, strict=True)] = 0
    cache_salt: Annotated[str, StringConstraints(max_length=128)] | None = None
    timeout_s: TimeoutS | None = None
    history: Annotated[list[Past], Field(max_length=10_000, default_factory=list)]
    num_labels: Count = Field(0, description="How many labels the client has from before.")

    @model_validator(mode="after")
    def _one_of(self) -> Open:
        if (self.messages is None) == (self.token_ids is None):
            raise ValueError("either messages or token_ids is needed")
        return self


class Append(_Append):
    stream: StreamId
    timeout_s: TimeoutS | None = None
    retry: bool = False


class Finish(_Finish):
    stream: StreamId
    timeout_s: TimeoutS | None = None
    retry: bool = False


class Rollback(_Rollback):
    stream: StreamId


class Fork(Strict):
    type: Literal["fork"]
    stream: StreamId
    new_stream: StreamId


class Close(Strict):
    type: Literal["close"]
    stream: StreamId


Operation = Open | Append | Finish | Rollback | Fork | Close
_READ: TypeAdapter[Operation] = TypeAdapter(Annotated[Operation, Field(discriminator="type")])


def read_frame(frame: str) -> Operation:
    """Parse one message of a client. Raises Refusal, which names the place of an error and never quotes the value."""
    try:
        message = json.loads(frame)
    except (ValueError, RecursionError):
        raise Refusal(400, "the frame is not JSON", "invalid_json") from None
    if not isinstance(message, dict):
        raise Refusal(400, "the frame is not a JSON object", "invalid_request")
    try:
        return _READ.validate_python(message)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        kinds = ("open", "append", "finish", "rollback", "fork", "close")
        place = ".".join(str(step) for step in first["loc"] if step not in kinds)[:200]
        text = f"{place or 'the message'}: {first['msg']}; see docs/serving/protocol.md"
        raise Refusal(400, text, "invalid_request", param=place or None) from None


def stream_id_of(frame: str) -> str | None:
    """The id of the stream that a refused frame names, None where it names none."""
    try:
        stream: Any = json.loads(frame)["stream"]
    except (ValueError, RecursionError, TypeError, KeyError, IndexError):
        return None
    return stream if isinstance(stream, str) and 1 <= len(stream) <= 128 else None
