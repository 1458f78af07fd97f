"""Worker: OpenVINO's stateful decoder. All streams are rows of one batch, which OpenVINO takes as one length: here
they are of one length, so nothing is padded, the best case for it."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import openvino
from protocol import Chunks, serve

_PREFILL_TOKENS = 4096  # of all rows together in one call: more only needs more memory


class OpenVino:
    """A compiled model and one request, whose state is the KV cache."""

    def __init__(self, options: dict[str, Any]) -> None:
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": options["threads"],
            "NUM_STREAMS": 1,
            "KV_CACHE_PRECISION": options["kv_precision"],
        }
        path = Path(options["model"]) / "openvino_model.xml"
        self._compiled = openvino.Core().compile_model(path, "CPU", settings)
        self._request = self._compiled.create_infer_request()
        self._inputs = {name for port in self._compiled.inputs for name in port.names}
        self._length = 0

    def describe(self) -> dict[str, Any]:
        names = ("INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION", "DYNAMIC_QUANTIZATION_GROUP_SIZE")
        return {
            **{name: metadata.version(name) for name in ("openvino", "nncf", "optimum-intel")},
            **{name.lower(): str(self._compiled.get_property(name)) for name in names},
        }

    def check(self, sequences: Chunks) -> list[int]:
        self.prepare([[]] * len(sequences))
        winners = self.advance(sequences)
        self.prepare([[]])
        return winners

    def prepare(self, prompts: Chunks) -> None:
        self._request.reset_state()
        self._length = 0
        ids = np.array(prompts, dtype=np.int64)
        step = max(1, _PREFILL_TOKENS // len(prompts))
        for first in range(0, ids.shape[1], step):
            self._infer(ids[:, first : first + step])

    def advance(self, chunks: Chunks) -> list[int]:
        winners: list[int] = self._infer(np.array(chunks, dtype=np.int64)).argmax(-1)[:, -1].tolist()
        return winners

    def _infer(self, ids: np.ndarray) -> np.ndarray:
        """Logits of all new tokens: [streams, new tokens, vocabulary]."""
        rows, new = ids.shape
        end = self._length + new
        inputs = {
            "input_ids": ids,
            "attention_mask": np.ones((rows, end), dtype=np.int64),
            "position_ids": np.broadcast_to(np.arange(self._length, end), (rows, new)),
            "beam_idx": np.arange(rows, dtype=np.int32),
        }
        self._length = end
        self._request.infer(
            {name: value for name, value in inputs.items() if name in self._inputs}, share_inputs=True
        )
        return np.asarray(self._request.get_tensor("logits").data)


if __name__ == "__main__":
    serve(OpenVino)
