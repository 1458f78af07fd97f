"""Parts: what a chunk, or a whole completion, has of one choice: which of it is text, and how to show some of it.

What is not known to be something else counts as text: an unknown field of a delta is judged as the JSON that it is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from guardengine import checks
from guardengine.proxy.chat_request import write_text
from guardengine.proxy.choice import ChoiceGuard
from guardengine.proxy.errors import broken
from guardengine.proxy.strict_json import read_json

Json = dict[str, Any]
Path = tuple[Any, ...]

_TEXTS = frozenset(("content", "refusal", "reasoning_content", "reasoning"))
_TWINS = frozenset(("reasoning_content", "reasoning"))  # servers send the same text under both names
_NO_MEDIA = ("audio", "images")
_WORD = re.compile(r"[a-z_]{1,32}")
_ID = re.compile(r"[\w.:@-]{1,128}", re.ASCII)
_KNOWN = frozenset(("index", "delta", "message", "finish_reason", "logprobs"))
_NO_TEXT = frozenset(
    (
        "stop_reason",
        "matched_stop",
        "native_finish_reason",
        "content_filter_results",
        "content_filter_offsets",
    )
)


@dataclass(slots=True)
class Text:
    """A text in a delta: where it stands there, and in what the guard reads. is_whole: it is shown whole or not."""

    paths: list[Path]
    text: str
    start: int
    is_whole: bool

    @property
    def end(self) -> int:
        return self.start + len(self.text)


@dataclass(slots=True, eq=False)
class Part:
    """One choice's part of a chunk. sent: how many of the guard's characters were shown of it."""

    guard: ChoiceGuard
    choice: Json
    key: str  # "delta" or "message"
    texts: list[Text] = field(default_factory=list)
    is_last: bool = False
    sent: int = -1  # nothing yet

    @property
    def is_ready(self) -> bool:
        """Whether all of it may be shown."""
        if self.guard.is_cut:
            return False
        if self.is_last:
            return self.guard.is_over
        return not self.texts or self.texts[-1].end <= self.guard.cleared

    @property
    def has_begun(self) -> bool:
        return self.sent >= 0

    def piece(self, upto: int) -> Json:
        """A delta, or message, with what was not shown of it of the guard's first `upto` characters; {} if there is no
        text to show. It has the fields that are no text where it is the first piece."""
        source, shown, calls = self.choice[self.key], Json(), dict[int, Json]()
        for text in self.texts:
            start, end = max(text.start, self.sent), min(text.end, upto)
            if text.is_whole and self.sent < text.end <= upto:
                start = text.start
            elif text.is_whole or end <= start:
                continue
            for path in text.paths:
                value = text.text[start - text.start : end - text.start]
                if text.is_whole:
                    value = _at(source, path)
                if path[0] == "tool_calls" and len(path) > 1:
                    _put(calls.setdefault(path[1], {}), path[2:], value)
                else:
                    _put(shown, path, value)
        for at, call in calls.items():
            shown.setdefault("tool_calls", []).append(self._call_head(at) | call)
        if not shown:
            return {}
        if not self.has_begun:
            shown = {name: value for name, value in source.items() if not _is_text(name, value)} | shown
        self.sent = upto
        return shown

    def _call_head(self, at: int) -> Json:
        """What is no text in a tool call: all of it in its first piece, its index in others."""
        call = self.choice[self.key]["tool_calls"][at]
        starts = [text.start for text in self.texts for path in text.paths if path[:2] == ("tool_calls", at)]
        is_first = self.sent <= min(starts)
        return {
            name: value
            for name, value in call.items()
            if name == "index" or (is_first and name != "function" and _is_label(name, value))
        }


def read_object(data: bytes, what: str) -> Json:
    """The JSON object that the upstream has sent as `what`. Raises UpstreamError."""
    try:
        found = read_json(data)
    except ValueError as error:
        raise broken(f"{what} that has not one reading: {error}") from None
    if not isinstance(found, dict):
        raise broken(f"{what} that is no JSON object")
    return found


def read_parts(chunk: Json, guards: list[ChoiceGuard], key: str) -> list[Part]:
    """Give a chunk's text to the guards. Raises UpstreamError for what is no chunk, and text after a choice's end."""
    choices = chunk.get("choices")
    if not isinstance(choices, list):
        raise broken("no chat completion: it has no list of choices")
    parts, seen = [], set[int]()
    for choice in choices:
        index = choice.get("index", 0) if isinstance(choice, dict) else None
        if not checks.is_whole_number(index, 0, len(guards) - 1) or index in seen:
            raise broken("a choice that was not asked for, or twice")
        seen.add(index)
        if not isinstance(choice.get(key), dict):
            if choice.get(key) is not None or "text" in choice:
                raise broken(f"a choice whose {key} is no object")
            choice[key] = {}
        parts.append(_read_part(choice, guards[index], key))
    return parts


def _read_part(choice: Json, guard: ChoiceGuard, key: str) -> Part:
    part = Part(guard, choice, key)
    part.is_last = choice.get("finish_reason") is not None or key == "message"
    if guard.is_cut:  # nothing more of it is judged, or shown
        return part
    found = _texts(choice[key], is_whole=key == "message")
    said = "".join(each.text for each in found)
    logged = _logged(choice.get("logprobs"))
    if logged and logged != said:  # tokens of another text: to be judged themselves
        found.append(_Found(("logprobs",), [], logged, True))
    for name, value in choice.items():
        if name not in _KNOWN and name not in _NO_TEXT and isinstance(value, str | list | dict) and value:
            found.append(_Found((name,), [], write_text(value), True))
    if found and guard.is_ending:
        raise broken("text after the end of a choice")
    for each in found:
        start = guard.give(each.fields, each.text)
        part.texts.append(Text(each.paths, each.text, start, each.is_whole))
    if part.is_last:
        guard.end()
    return part


class _Found(NamedTuple):
    """A text, which fields it is of for the guard, where it stands, and whether it is shown whole only."""

    fields: tuple[Any, ...]
    paths: list[Path]
    text: str
    is_whole: bool


def _texts(delta: Json, *, is_whole: bool) -> list[_Found]:
    found: list[_Found] = []
    for name, value in delta.items():
        if not _is_text(name, value):
            continue
        if name in _NO_MEDIA:
            raise broken(f"{name}, which the guard cannot judge")
        if name in _TWINS and found and found[-1].fields[0] in _TWINS and found[-1].text == value:
            twin = found.pop()
            found.append(_Found((*twin.fields, name), [*twin.paths, (name,)], value, False))
        elif name in _TEXTS and isinstance(value, str):
            found.append(_Found((name,), [(name,)], value, False))
        elif name == "tool_calls" and isinstance(value, list):
            for at, call in enumerate(value):
                found += _called(call, (name, at), is_whole)
        elif name == "function_call" and isinstance(value, dict):
            found += _function(value, (name,), (name,), is_whole)
        else:
            found.append(_Found((name,), [(name,)], write_text(value), True))
    return found


def _called(call: Any, path: Path, is_whole: bool) -> list[_Found]:
    if not isinstance(call, dict) or not isinstance(call.get("function"), dict | None):
        raise broken("a tool call that is none")
    found: list[_Found] = []
    number = call.get("index", path[1])
    if not isinstance(number, int):
        raise broken("a tool call that is none")
    for name, value in call.items():
        if name == "function" and value:
            found += _function(value, (*path, name), ("tool", number), is_whole)
        elif isinstance(value, str | list | dict) and value and not _is_label(name, value):
            found.append(_Found((("tool", number, name),), [(*path, name)], write_text(value), True))
    return found


def _is_label(name: str, value: Any) -> bool:
    """Whether something in a tool call is an id or a type that says nothing."""
    pattern = {"id": _ID, "type": _WORD}.get(name)
    return pattern is not None and isinstance(value, str) and pattern.fullmatch(value) is not None


def _function(function: Json, path: Path, field: Path, is_whole: bool) -> list[_Found]:
    found = []
    for name, value in function.items():
        if isinstance(value, str | list | dict) and value:
            can_split = name == "arguments" and isinstance(value, str) and not is_whole
            found.append(_Found(((*field, name),), [(*path, name)], write_text(value), not can_split))
    return found


def _is_text(name: str, value: Any) -> bool:
    if name == "role" and isinstance(value, str) and _WORD.fullmatch(value):
        return False
    return isinstance(value, str | list | dict) and bool(value)


def _logged(logprobs: Any) -> str:
    """The text of the tokens whose log probabilities these are."""
    if not logprobs:
        return ""
    if isinstance(logprobs, dict) and set(logprobs) <= {"content", "refusal"}:
        tokens = [token for name in ("content", "refusal") for token in logprobs.get(name) or ()]
        if all(isinstance(token, dict) and isinstance(token.get("token"), str) for token in tokens):
            return "".join(token["token"] for token in tokens)
    return write_text(logprobs)


def _put(target: Json, path: Path, value: Any) -> None:
    for step in path[:-1]:
        target = target.setdefault(step, {})
    target[path[-1]] = value


def _at(value: Any, path: Path) -> Any:
    for step in path:
        value = value[step]
    return value
