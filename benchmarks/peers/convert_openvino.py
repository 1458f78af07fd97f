"""Run by OpenVINO's interpreter: a Qwen3ForCausalLM folder as a stateful OpenVINO model, float16 or int8 weights.

    python convert_openvino.py SOURCE TARGET f16|int8

int8 is what optimum-intel's users get by default: nncf's weight compression, one scale a row, without calibration.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path


def convert(source: Path, target: Path, weights: str) -> None:
    """Write the folder `target` with openvino_model.xml, whole or not at all."""
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

    compression = {"f16": None, "int8": OVWeightQuantizationConfig(bits=8, sym=False)}[weights]
    model = OVModelForCausalLM.from_pretrained(
        source,
        export=True,
        compile=False,
        use_cache=True,
        stateful=True,
        load_in_8bit=False if compression is None else None,
        quantization_config=compression,
    )
    part = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    part.rename(target)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
