"""split_thinking(): what an assistant said to itself, and what it said. Knows no template and no engine."""

from __future__ import annotations

import re

_TAG = re.compile(r"</?think>")


def split_thinking(text: str) -> tuple[str | None, str]:
    """The thinking and the output in one reply of a reasoning model.

    The output is what follows the last </think>; everything before it is thinking, whether a <think> opened it or the
    prompt did, so that no text is in neither. A <think> that nothing closes is thinking to the end, with the output "".
    A text with no such tag is output, and the thinking is None; thinking that is only white space counts as none.

    Tags inside the thinking become line breaks, and newlines around both parts are dropped, as Qwen3's template does.
    """
    before, closing, output = text.rpartition("</think>")
    if not closing:
        said, opening, rest = text.partition("<think>")
        if not opening:
            return None, text
        before, output = said + opening + rest, ""
    thinking = _TAG.sub("\n", before).strip("\n")
    return (thinking if thinking.strip() else None), _TAG.sub("\n", output).strip("\n")
