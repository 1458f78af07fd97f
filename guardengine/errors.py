"""Every error that guardengine raises on purpose, as a tree:

    Exception
    └── GuardEngineError        all of them: catch this one to catch every error of guardengine
        ├── CheckpointError     a checkpoint cannot be found, read or trusted
        ├── ConfigError         an option is unknown, out of range or not supported here
        ├── InvalidInput        what was passed in cannot be judged
        │   └── InvalidTokens   token ids
        │       └── InvalidText messages or text
        ├── StreamTooLong       the stream would become longer than `max_model_len`
        ├── Overloaded          there is no room now
        ├── StreamClosed        the stream or the engine has been closed
        ├── WrongThread         the call comes from a thread that does not own the engine
        ├── WrongLoop           the call comes from another event loop
        ├── Blocked             a policy blocks the prompt or the reply
        ├── AuditError          the audit log cannot be written
        ├── OutputError         a file of results cannot be written
        ├── ServerError         a server cannot be reached, refuses the API key, or fails
        ├── LabelsDiffer        the benchmark's check found other logits than transformers has
        └── IntegrityError      the engine's books contradict each other: a bug in guardengine

Each message names the value, the limit that it broke, and what to do about it. A public call that raises has
changed nothing: no stream, block or label was touched. (Blocked is about a reply, not about a call.)
"""

from __future__ import annotations

import typing


class GuardEngineError(Exception):
    """The parent of every error that guardengine raises on purpose. Anything else that comes out is a bug."""


class CheckpointError(GuardEngineError):
    """A checkpoint cannot be found, read or trusted.

    When: while a checkpoint or its tokenizer is loaded, and where a snapshot or an audit log belongs to other weights.
    What to do: the message names the file and the tensor or key. Download that file again, or pass another folder.
    """


class ConfigError(GuardEngineError):
    """An option is unknown, out of range, or not supported by this machine or this checkpoint.

    When: as the engine, client or command is made, or as the call begins; nothing has run yet.
    What to do: the message has the value and what is allowed. Correct the call; trying again does not help.
    """


class InvalidInput(GuardEngineError):
    """Token ids or text that cannot be judged.

    When: catch it to refuse whatever a user sent that the model cannot read. Raised as InvalidTokens or InvalidText.
    What to do: refuse the input or mend it, as the message says; trying again with the same input does not help.
    """


class InvalidTokens(InvalidInput):
    """Token ids that cannot be fed: out of range, none at all, or control tokens where content is expected.

    When: from `open`, `append` and `rollback`. Also where ids would overtake text that is still held back.
    What to do: the message names the id and its index. Pass Qwen3 ids, or use `append_text` for another tokenizer.
    """


class InvalidText(InvalidTokens):
    """Messages or text that cannot become token ids: wrong roles, wrong types, or no valid Unicode.

    A kind of InvalidTokens, because code that catches InvalidTokens for both must go on working.

    When: from every call that takes messages or text, and for rows of data sets.
    What to do: the message names the message and the character. Replace lone surrogates, leave out what is no text.
    """


class StreamTooLong(GuardEngineError):
    """The tokens would make a stream longer than `max_model_len`, or than the whole KV cache.

    When: from `open`, `append` and `append_text`. The whole call is refused; none of its tokens were added.
    What to do: judge less text, or give the engine a larger `max_model_len` or `kv_cache_bytes`.
    """


class Overloaded(GuardEngineError):
    """There is no room now: streams, KV cache blocks or waiting tokens are at their limit.

    When: from `open` and `append`, before anything has changed. Policies may cover it: see `Policy.on_overload`.
    What to do: the same call may succeed later. Wait, close streams, or send the conversation to another engine.
    """


class StreamClosed(GuardEngineError):
    """The stream, or the engine that it belongs to, has been closed.

    When: from every call on it afterwards. Idle streams are closed by `idle_ttl_s`, all of them by `engine.close()`.
    What to do: open the conversation again; what the prefix cache still has is not computed again.
    """


class WrongThread(GuardEngineError):
    """The call comes from a thread that does not own the engine, or from inside another call of the engine.

    When: from any call of an Engine or of its streams. The first thread that uses an engine owns it.
    What to do: use AsyncEngine, which any number of tasks may share, or one engine for each thread.
    """


class WrongLoop(GuardEngineError):
    """The call comes from another event loop than the one that used the AsyncEngine first.

    When: from any call of an AsyncEngine or of its streams.
    What to do: use it from one event loop, or make an AsyncEngine for each.
    """


class Blocked(GuardEngineError):
    """A policy blocks the prompt or the reply.

    When: only where a block was asked for as an error, as with `on_block="raise"`. Else `stream.verdict` says it.
    What to do: show nothing more of the reply, and tell the reader. `verdict` is the Verdict with risk and rule.
    """

    def __init__(self, message: str, verdict: typing.Any) -> None:
        super().__init__(message)
        self.verdict = verdict

    @classmethod
    def by(cls, verdict: typing.Any) -> Blocked:
        """The error for a verdict that blocks.

        Args:
            verdict: A verdict with the action "block".
        """
        what = "the prompt" if verdict.rule == "prompt" else "the reply"
        category = "" if verdict.category is None else f", {verdict.category}"
        return cls(f"{what} is blocked: {verdict.risk}{category} (rule {verdict.rule})", verdict)


class AuditError(GuardEngineError):
    """The audit log cannot be written. Labels that are not in the log are not handed out.

    When: from `step` and the calls that write to the log, as on a full disk.
    What to do: make the file writable again. The labels come with the next step that can write.
    """


class OutputError(GuardEngineError):
    """A file of results cannot be written, as on a full disk.

    When: from the commands that write data sets. What was written before is kept.
    What to do: make room, or name another file, and give the same command again: it goes on where it was.
    """


class ServerError(GuardEngineError):
    """A server cannot be reached, refuses the API key, or fails.

    When: from the clients of `guardengine serve`; from `guardengine chat` also for the LLM's server.
    What to do: the message names the address and the answer. Check both; streams reconnect by themselves.
    """


class LabelsDiffer(GuardEngineError):
    """The engine's logits are not those of transformers, so a measured time would mean nothing.

    When: from the benchmark, before it times anything.
    What to do: report it, with the machine and the command: it is a bug.
    """


class IntegrityError(GuardEngineError):
    """The engine's books contradict each other: a bug in guardengine.

    When: from `check_integrity()` and from checks of the benchmark and the soak only.
    What to do: report it, with the message.
    """
