"""read_call(): a body of POST /v1/chat/completions, as the guard reads it and as the upstream is sent it.

The upstream is sent what was read, written anew, and only fields of which it is known what they do: whatever could put
text before the LLM that the guard does not see is refused by name, unless the operator lets it pass.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from guardengine import checks
from guardengine.proxy.settings import ProxySettings
from guardengine.proxy.strict_json import read_json, write_json
from guardengine.server.refusals import Refusal
from guardengine.text.thinking import split_thinking

# They choose among what the LLM writes, or say who asks; no text in them is read by it.
_PLAIN_FIELDS = (
    "model stream stream_options n temperature top_p top_k min_p max_tokens max_completion_tokens min_tokens "
    "frequency_penalty presence_penalty repetition_penalty length_penalty logit_bias logprobs top_logprobs seed stop "
    "stop_token_ids include_stop_str_in_output ignore_eos skip_special_tokens spaces_between_special_tokens "
    "tool_choice function_call parallel_tool_calls user metadata store service_tier safety_identifier prompt_cache_key "
    "cache_salt priority typical_p mirostat mirostat_tau mirostat_eta cache_prompt"
)
_PLAIN = frozenset(_PLAIN_FIELDS.split())
# Words that templates may print.
_WORDS = frozenset(("reasoning_effort", "verbosity"))
# Text for the LLM beside the messages: the guard reads it as a system message before them.
_TEXTS = ("tools", "functions", "response_format")
_WORD = re.compile(r"[a-z]{1,16}")
_NAME = re.compile(r"[\w.:@-]{1,128}", re.ASCII)
_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
_MESSAGE_FIELDS = (
    "role content name tool_call_id tool_calls function_call reasoning_content reasoning refusal"
)
_MESSAGE_KEYS = frozenset(_MESSAGE_FIELDS.split())


class Call(NamedTuple):
    """body: for the upstream. messages: for the guard."""

    body: bytes
    messages: list[dict[str, str]]
    model: str
    is_stream: bool
    num_choices: int


def read_call(body: bytes, settings: ProxySettings) -> Call:
    """Raises Refusal, 400, for what cannot be moderated or would be read in two ways; it names the place."""
    request = read_object(body)
    unread = frozenset(settings.pass_unread)
    for name, value in request.items():
        _check_field(name, value, unread)
    is_stream = request.get("stream")
    if is_stream is not None and not isinstance(is_stream, bool):
        raise _refusal("stream: true or false is needed", "stream")
    num_choices = 1 if request.get("n") is None else request["n"]
    if not checks.is_whole_number(num_choices, 1, settings.max_choices):
        raise _refusal(f"n: a whole number from 1 to max_choices={settings.max_choices} is needed", "n")
    model = request.get("model")
    if model is not None and (not isinstance(model, str) or len(model) > 200):
        raise _refusal("model: a string of at most 200 characters is needed", "model")
    messages = request.get("messages")
    if not isinstance(messages, list) or not messages:
        raise _refusal("messages: a non-empty list is needed", "messages", "invalid_text")
    read = [_message(message, f"messages[{index}]", unread) for index, message in enumerate(messages)]
    _check_end(read)
    texts = [write_text(request[name]) for name in _TEXTS if request.get(name) and name not in unread]
    if texts:
        before = "\n\n".join(texts)
        if read[0]["role"] == "system":
            before = f"{read.pop(0)['content']}\n\n{before}"
        read.insert(0, {"role": "system", "content": before})
    return Call(write_json(request), read, model or "", bool(is_stream), num_choices)


def _check_end(messages: list[dict[str, str]]) -> None:
    """Refuse a system message after the last turn of the user: the prompt is judged at that turn's end."""
    for index in range(len(messages) - 1, -1, -1):
        role = messages[index]["role"]
        if role == "system":
            raise _refusal(
                f"messages[{index}]: a system message after the last user turn would go unread; put it before that",
                f"messages[{index}]",
                "invalid_text",
            )
        if role != "assistant":
            return


def read_object(body: bytes) -> dict[str, Any]:
    """A JSON object of which there is one reading. Raises Refusal, 400."""
    try:
        found = read_json(body)
    except ValueError as error:
        raise Refusal(400, f"the body has not one reading: {error}", "invalid_json") from None
    if not isinstance(found, dict):
        raise Refusal(400, "the body is no JSON object", "invalid_json")
    return found


def write_text(value: Any) -> str:
    """Any value as a text that a guard can read: JSON, with characters as they are."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _check_field(name: str, value: Any, unread: Collection[str]) -> None:
    if name in _PLAIN or name in _TEXTS or name == "messages" or name in unread:
        return
    if name in _WORDS:
        if value is not None and (not isinstance(value, str) or not _WORD.fullmatch(value)):
            raise _refusal(f"{name}: one word in lower case is needed", name)
        return
    if name == "chat_template_kwargs":
        is_plain = isinstance(value, Mapping) and all(
            item is None or isinstance(item, bool | int | float) for item in value.values()
        )
        if value is not None and not is_plain:
            raise _refusal(f"{name}: only numbers, true, false and null are passed on", name)
        return
    if name == "modalities":
        if value not in (None, ["text"]):
            raise _refusal("modalities: the guard reads text only", name)
        return
    raise _refusal(
        f"{name!r:.80} is not passed on: it may put text before the LLM that the guard does not read; leave it out "
        "(the operator can let it pass: --pass-unread)",
        name[:80],
    )


def _message(message: Any, where: str, unread: Collection[str]) -> dict[str, str]:
    if not isinstance(message, dict):
        raise _refusal(f"{where}: an object with role and content is needed", where)
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise _refusal(f"{where}.role: one of {', '.join(_ROLES)} is needed", f"{where}.role")
    for key, value in message.items():
        if key not in _MESSAGE_KEYS and key not in unread and value not in (None, [], {}, ""):
            raise _refusal(
                f"{where} has {key!r:.80}, which the guard does not read; leave it out",
                f"{where}.{key}"[:200],
            )
    for key in ("name", "tool_call_id"):
        value = message.get(key)
        if value is not None and (not isinstance(value, str) or not _NAME.fullmatch(value)):
            raise _refusal(
                f"{where}.{key}: up to 128 letters, digits and . : @ - _ are needed", f"{where}.{key}"
            )
    texts = [_thought(message.get(key), f"{where}.{key}") for key in ("reasoning_content", "reasoning")]
    if texts[0] == texts[1]:
        texts.pop()
    content = _content(message.get("content"), f"{where}.content", unread)
    refusal = message.get("refusal")
    if refusal is not None and not isinstance(refusal, str):
        raise _refusal(f"{where}.refusal: a string is needed", f"{where}.refusal")
    calls = [called for key in ("tool_calls", "function_call") if (called := message.get(key))]
    if role == "assistant":
        # Templates drop thinking, and the LLM's need not be the guard's.
        thinking, said = split_thinking(content or "")
        texts += [thinking or "", said, refusal or "", *(_calls(called) for called in calls)]
    elif any(texts) or refusal or calls:
        raise _refusal(f"{where}: only the assistant thinks, refuses and calls tools", where)
    elif content is None:
        raise _refusal(f"{where}.content: text is needed", f"{where}.content", "invalid_text")
    else:
        texts.append(content)
    return {"role": _ROLES[role], "content": "\n\n".join(text for text in texts if text)}


def _thought(value: Any, where: str) -> str:
    if value is not None and not isinstance(value, str):
        raise _refusal(f"{where}: a string is needed", where)
    return value or ""


def _content(content: Any, where: str, unread: Collection[str]) -> str | None:
    """Content as one text, parts on lines of their own, as vLLM has it."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise _refusal(f"{where}: a string or a list of parts is needed", where)
    texts = []
    for index, part in enumerate(content):
        at = f"{where}[{index}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in ("text", "refusal") and isinstance(part.get(kind), str) and len(part) == 2:
            texts.append(part[kind])
        elif not isinstance(kind, str) or kind not in unread:
            raise _refusal(
                f"{at} has type {kind!r:.40}: the guard reads text only; send {{'type': 'text', 'text': ...}} (the "
                "operator can let other types pass unread: --pass-unread)",
                at,
                "unsupported_content",
            )
    return "\n".join(texts)


def _calls(calls: Any) -> str:
    """Tool calls of an earlier reply, as the guard reads those of this one: names and arguments."""
    texts = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        is_plain = isinstance(function, dict) and all(isinstance(value, str) for value in function.values())
        rest = {} if not isinstance(call, dict) or function is call else {**call, "function": ""}
        is_known = set(rest) <= {"id", "type", "index", "function"} and all(
            isinstance(value, int) or value == "" or (isinstance(value, str) and _NAME.fullmatch(value))
            for value in rest.values()
        )
        if isinstance(function, dict) and is_plain and is_known and set(function) <= {"name", "arguments"}:
            texts += [text for name in ("name", "arguments") if (text := function.get(name))]
        else:
            texts.append(write_text(call))
    return "\n".join(texts)


def _refusal(message: str, param: str, code: str = "invalid_request") -> Refusal:
    return Refusal(400, message, code, param=param[:200])
