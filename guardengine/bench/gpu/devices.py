"""The peak rates of GPUs, from their makers' data sheets. Nothing here was measured."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GPU:
    """The numbers of a GPU. Multiplications are dense, in bfloat16 with sums in float32; float32 is that of CUDA
    cores."""

    name: str
    bytes_per_s: float
    bf16_flops: float
    fp32_flops: float
    memory_bytes: float
    l2_bytes: float
    num_sms: int
    capability: tuple[int, int]
    source: str

    def flops(self, dtype: str) -> float:
        return self.bf16_flops if dtype == "bfloat16" else self.fp32_flops


GPUS: dict[str, GPU] = {
    "h200": GPU(
        "H200 SXM", 4.8e12, 989.4e12, 66.9e12, 141e9, 50 * 2**20, 132, (9, 0),
        "NVIDIA H200 Tensor Core GPU data sheet; L2 and SMs: H100 architecture white paper",
    ),
    "h100": GPU(
        "H100 SXM 80GB", 3.35e12, 989.4e12, 66.9e12, 80e9, 50 * 2**20, 132, (9, 0),
        "NVIDIA H100 Tensor Core GPU data sheet; L2 and SMs: H100 architecture white paper",
    ),
    "a100": GPU(
        "A100 SXM 80GB", 2.039e12, 312e12, 19.5e12, 80e9, 40 * 2**20, 108, (8, 0),
        "NVIDIA A100 80GB data sheet; L2 and SMs: A100 architecture white paper",
    ),
    "l4": GPU(
        "L4", 300e9, 121e12, 30.3e12, 24e9, 48 * 2**20, 58, (8, 9),
        "NVIDIA L4 data sheet (121 is half of its 242 with sparsity); L2 and SMs: Ada architecture white paper",
    ),
    "rtx4090": GPU(
        "GeForce RTX 4090", 1008e9, 165.2e12, 82.6e12, 24e9, 72 * 2**20, 128, (8, 9),
        "NVIDIA Ada GPU architecture white paper, appendix A",
    ),
    "rtx3090": GPU(
        "GeForce RTX 3090", 936.2e9, 71e12, 35.6e12, 24e9, 6 * 2**20, 82, (8, 6),
        "NVIDIA Ampere GA102 GPU architecture white paper, appendix A",
    ),
}  # fmt: skip
