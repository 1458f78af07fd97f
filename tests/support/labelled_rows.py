"""Labelled conversations for tests of evaluate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

USER = {"role": "user", "content": "How do I bake bread?"}
THINKING = {
    "role": "assistant",
    "content": "<think>\nThey want bread.\n</think>\n\nMix flour and water, then wait.",
}
PLAIN = {"role": "assistant", "content": "Mix flour and water, then wait for an hour or two."}


def record(*messages: dict[str, str], label: str = "Unsafe", **fields: Any) -> dict[str, Any]:
    return {"message": list(messages), "label": label, **fields}


def write(path: Path, *records: Any) -> Path:
    lines = [each if isinstance(each, str) else json.dumps(each) for each in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
