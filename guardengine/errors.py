"""Every error that guardengine raises on purpose.

Each message names the offending value, the limit it broke and what to do about it. An error from a public
call means that nothing changed: no stream, block or label was touched. (Blocked is about a reply, not about a call.)
"""

from __future__ import annotations

import typing


class GuardEngineError(Exception):
    """Base of all guardengine errors."""


class CheckpointError(GuardEngineError):
    """A checkpoint that cannot be found, read or trusted: names the file, the tensor or key, and the mend."""


class ConfigError(GuardEngineError):
    """An option that is unknown, out of range, or not supported on this machine or by this checkpoint."""


class InvalidTokens(GuardEngineError):
    """Token ids that cannot be fed: out of range, empty, or control tokens where content is expected."""


class InvalidText(InvalidTokens):
    """Messages or text that cannot be rendered to token ids: wrong roles or types, or not valid Unicode."""


class StreamClosed(GuardEngineError):
    """A call on a stream (or engine) that has been closed."""


class StreamTooLong(GuardEngineError):
    """Tokens that would take a stream past `max_model_len`. The whole call is refused."""


class Overloaded(GuardEngineError):
    """No room now: streams, KV cache blocks or pending tokens are at their limit. Retry later, or elsewhere."""


class AuditError(GuardEngineError):
    """The audit log cannot be written. Labels that are not in it are not handed out: they come once it can be."""


class Blocked(GuardEngineError):
    """A prompt or reply that its policy blocks, where blocking is to raise. verdict: the Verdict that says why."""

    def __init__(self, message: str, verdict: typing.Any) -> None:
        super().__init__(message)
        self.verdict = verdict

    @classmethod
    def by(cls, verdict: typing.Any) -> Blocked:
        """The error that tells of a verdict."""
        what = "the prompt" if verdict.rule == "prompt" else "the reply"
        category = "" if verdict.category is None else f", {verdict.category}"
        return cls(f"{what} is blocked: {verdict.risk}{category} (rule {verdict.rule})", verdict)


class OutputError(GuardEngineError):
    """A file of results cannot be written, as on a full disk. What was written before is kept, to go on from."""


class ServerError(GuardEngineError):
    """A server that cannot be reached, refused the API key, or failed. Raised by the clients of `guardengine serve`,
    and by `guardengine chat` also of the LLM's server."""


class WrongThread(GuardEngineError):
    """A call from a thread that does not own the engine, or from inside another call of the engine."""


class WrongLoop(GuardEngineError):
    """A call from another event loop than the one that used the AsyncEngine first."""


class IntegrityError(GuardEngineError):
    """The engine's books contradict each other: a bug in guardengine. Raised by `check_integrity` only."""


class LabelsDiffer(GuardEngineError):
    """The engine's logits are not the model's: what it does in what time means nothing then."""
