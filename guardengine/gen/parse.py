"""parse(): a Gen checkpoint's answer, as the released code reads it.

    Safety: Unsafe
    Categories: Violent, PII
    Refusal: No

The last line is a response's only. The released code searches the whole answer for categories; here only the line that
names them counts. An answer without a safety line is unparsable, and never a pass.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from guardengine.checkpoint.model_config import RISKS
from guardengine.labels import UNPARSABLE

NONE = "None"
# In the order of the released expression: where one name is a part of another, the first that fits counts.
CATEGORIES = (
    "Violent",
    "Non-violent Illegal Acts",
    "Sexual Content or Sexual Acts",
    "PII",
    "Suicide & Self-Harm",
    "Unethical Acts",
    "Politically Sensitive Topics",
    "Copyright Violation",
    "Jailbreak",
)
REFUSALS = ("Yes", "No")

_SAFETY = re.compile(rf"Safety: ({'|'.join(RISKS)})")
_LINE = re.compile(r"^Categories:(.*)$", re.MULTILINE)
_CATEGORY = re.compile("|".join(CATEGORIES))
_REFUSAL = re.compile(rf"Refusal: ({'|'.join(REFUSALS)})")


class Parsed(NamedTuple):
    """What an answer says. `categories` in its order, each once; () for "None"."""

    safety: str
    categories: tuple[str, ...]
    refusal: str | None


def parse(text: str, *, has_refusal: bool) -> Parsed:
    """Read an answer. Nothing is raised: see UNPARSABLE."""
    safety = _SAFETY.search(text)
    line = _LINE.search(text)
    refusal = _REFUSAL.search(text) if has_refusal else None
    return Parsed(
        safety[1] if safety else UNPARSABLE,
        tuple(dict.fromkeys(_CATEGORY.findall(line[1]))) if line else (),
        refusal[1] if refusal else None,
    )
