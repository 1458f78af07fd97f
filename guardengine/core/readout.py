"""Readout: rows of logits -> Labels. Knows the heads' layout and the class names; no torch, no streams.

HiddenReadout stands in its place where a language model's head does the reading, later and elsewhere.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from guardengine.checkpoint.model_config import GuardHeadsConfig
from guardengine.core.state import Hidden, Reader
from guardengine.labels import Label

Floats = npt.NDArray[np.float32]


class _Columns(NamedTuple):
    """Where one role's logits stand in a row, and what they are called."""

    risk: slice
    category: slice
    risks: tuple[str, ...]
    categories: tuple[str, ...]


class Reading(NamedTuple):
    """Which row of a step's logits is to be read, and for what."""

    row: int
    stream_id: str
    role: Reader
    position: int
    token_id: int


class Readout:
    """Turns one step's logits [W, C] into labels, with probabilities computed for all rows at once."""

    def __init__(self, heads: GuardHeadsConfig) -> None:
        self.columns: dict[Reader, _Columns] = {}
        start = 0
        for role, risks, categories in (
            ("assistant", heads.response_risks, heads.response_categories),
            ("user", heads.query_risks, heads.query_categories),
        ):
            middle, end = start + len(risks), start + len(risks) + len(categories)
            self.columns[role] = _Columns(slice(start, middle), slice(middle, end), risks, categories)  # type: ignore[index]
            start = end

    def probabilities(self, logits: Floats) -> npt.NDArray[np.float64]:
        """Softmax over each classifier's own columns.  Shapes: logits, out [W, C]."""
        probs = np.empty(logits.shape, dtype=np.float64)
        for columns in self.columns.values():
            for part in (columns.risk, columns.category):
                scores = logits[:, part].astype(np.float64)
                with np.errstate(invalid="ignore"):  # non-finite logits are dealt with in `label`
                    scores = np.exp(scores - scores.max(axis=1, keepdims=True))
                probs[:, part] = scores / scores.sum(axis=1, keepdims=True)
        return probs

    def labels(
        self, readings: list[Reading], logits: Floats, probs: npt.NDArray[np.float64] | Floats
    ) -> list[Label]:
        """Name the classes of these rows.  Shapes: logits, probs [W, C]."""
        winners = {role: self._winners(columns, logits) for role, columns in self.columns.items()}
        all_probs = probs.tolist()
        labels = []
        for row, stream_id, role, position, token_id in readings:
            columns, (risks, categories) = self.columns[role], winners[role]
            # A copy: a view would keep the whole step's logits alive for as long as one label is held.
            own = logits[row].copy()
            own.setflags(write=False)
            row_probs = all_probs[row]
            labels.append(
                Label(
                    stream_id,
                    role,  # type: ignore[arg-type]
                    position,
                    token_id,
                    risks[row],
                    categories[row],
                    dict(zip(columns.risks, row_probs[columns.risk], strict=True)),
                    dict(zip(columns.categories, row_probs[columns.category], strict=True)),
                    own[columns.risk],
                    own[columns.category],
                )
            )
        return labels

    def _winners(self, columns: _Columns, logits: Floats) -> tuple[list[str], list[str]]:
        """Each row's likeliest risk and category."""
        risk_logits = logits[:, columns.risk]
        # argmax over NaN would name class 0, which is "Safe": broken numbers must not read as harmless.
        is_finite: Any = np.isfinite(risk_logits).all(axis=1).tolist()
        worst = _worst(columns.risks)
        risks = [
            columns.risks[index] if finite else worst
            for index, finite in zip(risk_logits.argmax(axis=1).tolist(), is_finite, strict=True)
        ]
        return risks, [columns.categories[i] for i in logits[:, columns.category].argmax(axis=1).tolist()]


class HiddenReadout(Readout):
    """Hands a model's rows on as they are, for `guardengine.gen`: no classes, no labels."""

    def __init__(self) -> None:
        self.columns = {}

    def probabilities(self, logits: Floats) -> Floats:  # type: ignore[override]
        return logits

    def labels(  # type: ignore[override]
        self, readings: list[Reading], rows: Floats, probs: npt.NDArray[np.float64] | Floats
    ) -> list[Hidden]:
        """Shapes: rows [W, E]."""
        # Copies: a view would keep the whole step's rows alive.
        return [Hidden(read.stream_id, read.role, read.position, rows[read.row].copy()) for read in readings]


def _worst(risks: tuple[str, ...]) -> str:
    return "Unsafe" if "Unsafe" in risks else next(risk for risk in risks if risk != "Safe")
