"""UpstreamError: what is wrong with the LLM's server or with what it sent. Its message never quotes that."""

from __future__ import annotations

from guardengine.server.refusals import Refusal


class UpstreamError(Refusal):
    """The upstream cannot be reached or does not answer as an OpenAI-compatible server. Status 502, or 504 for one that
    is too slow."""

    def __init__(self, message: str, code: str, *, status: int = 502) -> None:
        super().__init__(status, message, code, type="server_error")


def broken(what: str) -> UpstreamError:
    """What came is not what it should be."""
    return UpstreamError(f"the upstream sent {what}; nothing more of its reply is shown", "upstream_broken")
