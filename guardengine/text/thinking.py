"""split_thinking(): the reasoning and the answer in an assistant's reply. Knows no template and no engine."""

from __future__ import annotations

import re

_TAG = re.compile(r"</?think>")


def split_thinking(text: str) -> tuple[str | None, str]:
    """Split a reply of a reasoning model into its reasoning and its answer.

    The answer is the text after the last </think>. Everything before it is reasoning, whether a <think> in the reply
    opened it or the prompt did. A <think> that is never closed makes everything reasoning, and the answer is "". A
    text without such a tag is all answer. Tags inside the reasoning become line breaks, and newlines around both parts
    are removed, as in Qwen3's template.

    Args:
        text: The whole reply.

    Returns:
        The reasoning, None where there is none or only white space; and the answer.
    """
    before, closing, output = text.rpartition("</think>")
    if not closing:
        said, opening, rest = text.partition("<think>")
        if not opening:
            return None, text
        before, output = said + opening + rest, ""
    thinking = _TAG.sub("\n", before).strip("\n")
    return (thinking if thinking.strip() else None), _TAG.sub("\n", output).strip("\n")
