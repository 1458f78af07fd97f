"""Readout: rows of logits -> Labels. Knows the heads' layout and the class names; no torch, no streams."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from guardengine.config import GuardHeadsConfig
from guardengine.labels import Label, Role

Floats = npt.NDArray[np.float32]


class _Columns(NamedTuple):
    """Where one role's logits stand in a row, and what they are called."""

    risk: slice
    category: slice
    risks: tuple[str, ...]
    categories: tuple[str, ...]


class Readout:
    """Turns one step's logits [W, C] into labels, with probabilities computed for all rows at once."""

    def __init__(self, heads: GuardHeadsConfig) -> None:
        self.columns: dict[Role, _Columns] = {}
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

    def label(
        self,
        stream_id: str,
        role: Role,
        position: int,
        token_id: int,
        logits: Floats,
        probs: npt.NDArray[np.float64] | Floats,
    ) -> Label:
        """Name one row's classes.  Shapes: logits, probs [C]."""
        columns = self.columns[role]
        # Copies: a view would keep the whole step's logits alive for as long as one label is held.
        risk_logits, category_logits = logits[columns.risk].copy(), logits[columns.category].copy()
        risk_logits.setflags(write=False)
        category_logits.setflags(write=False)
        # argmax over NaN would name class 0, which is "Safe": broken numbers must not read as harmless.
        is_finite = bool(np.isfinite(risk_logits).all())
        return Label(
            stream_id=stream_id,
            role=role,
            position=position,
            token_id=token_id,
            risk=columns.risks[int(risk_logits.argmax())] if is_finite else _worst(columns.risks),
            category=columns.categories[int(category_logits.argmax())],
            risk_probs=dict(zip(columns.risks, probs[columns.risk].tolist(), strict=True)),
            category_probs=dict(zip(columns.categories, probs[columns.category].tolist(), strict=True)),
            risk_logits=risk_logits,
            category_logits=category_logits,
        )


def _worst(risks: tuple[str, ...]) -> str:
    return "Unsafe" if "Unsafe" in risks else next(risk for risk in risks if risk != "Safe")
