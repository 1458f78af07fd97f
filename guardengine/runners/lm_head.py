"""LmHead: a language model's head, multiplied where it is needed and no more.

The step itself ends with the last norm (`Scores.logits` are those rows then): which rows are wanted, and of how many
tokens of the vocabulary, is known to whoever reads the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Floats = npt.NDArray[np.float32]
_CHUNK = 8192  # rows of the head that `plain_product` widens at a time


class LmHead:
    """The head of a Gen checkpoint.

    Args:
        weight: [V, E].
        product: Multiplies rows [W, E] of the model's dtype with all of it: [W, V] float32.
    """

    def __init__(self, weight: Tensor, product: Callable[[Tensor], Tensor]) -> None:
        self._weight, self._product = weight, product  # [V, E]

    @torch.inference_mode()
    def rows_of(self, token_ids: Sequence[int]) -> Floats:
        """The head's rows of K tokens, for products of one's own: [K, E] float32."""
        index = torch.tensor(token_ids, device=self._weight.device)
        return self._weight[index].float().cpu().numpy()

    @torch.inference_mode()
    def logits(self, hidden: Floats) -> Floats:
        """The logits of the whole vocabulary, not rounded to the model's dtype.

        Args:
            hidden: [W, E], a step's `Scores.logits`.

        Returns:
            [W, V] float32.
        """
        rows = torch.from_numpy(hidden).to(self._weight)
        return self._product(rows).cpu().numpy()


def plain_product(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """The product with a head [V, E] of any dtype, in float32: from rows [W, E] to [W, V]."""

    def product(rows: Tensor) -> Tensor:
        parts = [rows.float() @ part.float().T for part in weight.split(_CHUNK)]
        return torch.cat(parts, dim=-1)

    return product
