"""The batches that paged kernels are tested with mean the same to the reference and to a formula."""

from __future__ import annotations

import pytest
import torch
from ragged_batches import ragged_batch, shapes

from guardengine.kernels import reference


@pytest.mark.parametrize("int8", [False, True])
def test_ragged_batches_are_what_the_reference_takes(int8: bool) -> None:
    for lengths, wanted in shapes(block_size=4, segment=8):
        batch = ragged_batch(lengths, wanted, int8=int8, dtype=torch.float32)
        out = reference.paged_attention(*batch.arguments(32**-0.5))
        assert out.isfinite().all()
        if not wanted[0]:
            continue
        position, k, v = wanted[0][0], batch.keys[0].double(), batch.values[0].double()
        k, v = (part[: position + 1].repeat_interleave(2, dim=1) for part in (k, v))
        weights = (torch.einsum("hd,nhd->hn", batch.q[0].double(), k) * 32**-0.5).softmax(-1)
        exact = torch.einsum("hn,nhd->hd", weights, v)
        torch.testing.assert_close(out[0].double(), exact, rtol=0, atol=0.02 if int8 else 1e-5)
