"""Outliers for random weights: the property that makes trained Qwen3 models hard to quantize, planted into a random
one.

Independent normal weights give activations without structure, and rounding them to int8 costs almost nothing. In a
trained model a few channels of the residual stream and a few neurons of the MLPs are 10 to 100 times larger than the
rest and nearly the same at every token, while the signal is in the small ones. The first token's channels are larger
still, and the weights of norms differ from channel to channel. Here this is reproduced by the same mechanism:

- Embeddings have standard deviation 1, so that the additions of the layers do not hide which token it was.
- 1 in 256 channels of the residual stream (at least 2; the same in all layers) starts at 40, with a sign of its own.
At <|im_start|> (id 0 in a vocabulary without it), with which every rendered conversation begins, it starts 50 times
higher: the massive first token.
- 1 in 256 neurons of each MLP (at least 2) reads these channels through gate and up, so that it fires at every token,
10 to 100 times as high as its neighbours. The rows of down_proj that write to these channels read these neurons, so
each layer raises the channels further; RMSNorm bounds what the neurons see of it.
- All other weights that read these channels or neurons are a fifth as large as their neighbours, as in a model that
has learned to ignore them. The rounding error of the small channels then counts all the more.
- The weights of norms are log-normal (sigma 0.4), half as large in the outlier channels, and almost 0 there in the
final norm, so labels depend on the other channels. The norm of the keys has 1 in 64 channels 8 times as large.

Every planted weight varies by a quarter around its value. Everything else is drawn as without outliers.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from guardengine.checkpoint.model_config import ModelConfig

Floats = npt.NDArray[np.float64]

NORM_SIGMA = 0.4
FIRST_TOKEN_ID = 151644  # <|im_start|>
EMBEDDING_STD = 1.0
_LINEAR_STD = 0.64  # times 1 / sqrt(inputs): make_checkpoint's
_START, _FIRST_TOKEN = 40.0, 50.0
_NORM_GAIN, _FINAL_NORM_GAIN, _KEY_GAIN = 0.5, 0.02, 8.0
_WEAKER = 0.2
# When the normed outlier channels reach their bound, gate and up of an outlier neuron are 1.2, it fires at about 1.1,
# and all of them together add 1 to each outlier channel.
_DRIVE, _FIRES_AT, _PUMP = 1.2, 1.1, 1.0
_SPREAD = 0.25


def norm_quantiles(normal: Floats) -> Floats:
    """The values from which the weights of a norm are drawn, given quantiles of the normal distribution."""
    return np.exp(NORM_SIGMA * normal)


class Planted(NamedTuple):
    """The weights of one tensor that are drawn differently.

    Attributes:
        indices: Flat indices, ascending.
        means: Mean of each.
        stds: Standard deviation of each.
    """

    indices: npt.NDArray[np.int64]
    means: Floats
    stds: Floats


class Outliers:
    """The outliers of a model, and their weights. They depend on its sizes and on `key` alone."""

    def __init__(self, config: ModelConfig, key: str) -> None:
        self.config, self.key = config, key
        hidden = config.hidden_size
        self.channels = self._choose("channels", hidden, max(2, hidden // 256))
        random = self._random("signs").random_raw(len(self.channels))
        self.signs: Floats = np.where(random >> np.uint64(63), 1.0, -1.0)

    def neurons(self, layer: str) -> npt.NDArray[np.int64]:
        """The outlier neurons of an MLP. layer: such as "model.layers.0"."""
        size = self.config.intermediate_size
        return self._choose(f"{layer}.neurons", size, max(2, size // 256))

    def planted(self, name: str, shape: tuple[int, ...]) -> Planted | None:
        """The planted weights of a tensor; None where it has none."""
        hidden, channels = self.config.hidden_size, self.channels
        if len(shape) == 1:
            if name.endswith("k_norm.weight"):
                return _gains(self._choose(name, shape[0], max(1, shape[0] // 64)), _KEY_GAIN)
            if name.endswith(("input_layernorm.weight", "post_attention_layernorm.weight")):
                return _gains(channels, _NORM_GAIN)
            return _gains(channels, _FINAL_NORM_GAIN) if name == "model.norm.weight" else None
        if name == "model.embed_tokens.weight":
            heights = np.full(shape[0], _START)
            heights[FIRST_TOKEN_ID if shape[0] > FIRST_TOKEN_ID else 0] *= _FIRST_TOKEN
            return _columns(shape, channels, heights, self.signs)
        layer = name.partition(".mlp.")[0]
        if name.endswith("down_proj.weight"):
            neurons = self.neurons(layer)
            heights = np.zeros(shape[0])
            heights[channels] = self.signs * _PUMP / (_FIRES_AT * len(neurons))
            return _read(shape, neurons, heights, np.ones(len(neurons)))
        if name.endswith(("gate_proj.weight", "up_proj.weight")):
            heights = np.zeros(shape[0])
            bound = _NORM_GAIN * (hidden / len(channels)) ** 0.5
            heights[self.neurons(layer)] = _DRIVE / (bound * len(channels))
            return _read(shape, channels, heights, self.signs)
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            return _read(shape, channels, np.zeros(shape[0]), self.signs)
        return None

    def _choose(self, what: str, size: int, count: int) -> npt.NDArray[np.int64]:
        """`count` different indices below `size`, ascending. Raw draws: the same on every machine."""
        order = np.argsort(self._random(what).random_raw(size), kind="stable")
        return np.sort(order[:count]).astype(np.int64)

    def _random(self, what: str) -> np.random.PCG64:
        digest = hashlib.sha256(f"{self.key}/outliers/{what}".encode()).digest()
        return np.random.PCG64(int.from_bytes(digest))


def _gains(channels: npt.NDArray[np.int64], gain: float) -> Planted:
    means = np.full(len(channels), gain)
    return Planted(channels, means, _SPREAD * means)


def _columns(
    shape: tuple[int, ...], columns: npt.NDArray[np.int64], row_values: Floats, column_values: Floats
) -> Planted:
    """Whole columns of a matrix, with means row_values x column_values."""
    indices = np.arange(shape[0])[:, None] * shape[1] + columns[None]
    means = np.outer(row_values, column_values).ravel()
    return Planted(indices.ravel(), means, _SPREAD * abs(means))


def _read(
    shape: tuple[int, ...], columns: npt.NDArray[np.int64], row_values: Floats, column_values: Floats
) -> Planted:
    """Whole columns of a matrix, with means row_values x column_values, and weak random weights in the rows whose
    value is 0."""
    planted = _columns(shape, columns, row_values, column_values)
    weak = _WEAKER * _LINEAR_STD / shape[1] ** 0.5
    return planted._replace(stds=np.where(planted.means == 0.0, weak, planted.stds))
