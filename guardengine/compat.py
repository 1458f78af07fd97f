"""AutoGuard: a drop-in for code written against the released Qwen3Guard-Stream remote code.

Same calls, same dict of four lists, same output fields; underneath, a stream of an engine instead of a re-run
of the whole conversation, so a token costs the same however many came before it.

Source: the README and eval scripts of QwenLM/Qwen3Guard, which define how the remote code is called.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from guardengine.checkpoint.model_config import ModelConfig
from guardengine.core.admission import Ticket
from guardengine.core.engine_core import EngineCore
from guardengine.core.feeds import Feed
from guardengine.core.state import StreamState, Wanted
from guardengine.core.whole_streams import run_feeds
from guardengine.engine.engine import Engine
from guardengine.errors import ConfigError, InvalidTokens
from guardengine.labels import Label, Role
from guardengine.policy import Policy

Result = dict[str, list[Any]]


def _empty_result() -> Result:
    return {"risk_level": [], "risk_prob": [], "category": [], "category_prob": []}


@dataclass(slots=True, eq=False, weakref_slot=True)
class StreamingState:
    """What `stream_moderate_from_ids` returns as stream_state: pass it back, then to `close_stream`."""

    stream: StreamState = field(repr=False)
    results: dict[Role, Result] = field(
        default_factory=lambda: {"user": _empty_result(), "assistant": _empty_result()}, repr=False
    )


@dataclass(frozen=True, slots=True)
class GuardLogits:
    """All four heads at every position, each [B, T, classes] float32; zeros where attention_mask is 0."""

    risk_level_logits: Tensor
    category_logits: Tensor
    query_risk_level_logits: Tensor
    query_category_logits: Tensor


class AutoGuard:
    """The released model class's public behaviour. Make one with `from_pretrained`."""

    def __init__(self, engine: Engine, config: ModelConfig) -> None:
        heads = config.heads
        if heads is None:
            raise ConfigError("AutoGuard needs a Qwen3Guard-Stream checkpoint")
        self.engine, self.config = engine, config
        self.response_risk_level_map = dict(enumerate(heads.response_risks))
        self.response_category_map = dict(enumerate(heads.response_categories))
        self.query_risk_level_map = dict(enumerate(heads.query_risks))
        self.query_category_map = dict(enumerate(heads.query_categories))
        self._policy = Policy.strict()

    @staticmethod
    def from_pretrained(
        path_or_id: str | Path,
        *,
        torch_dtype: Any = None,
        dtype: Any = "auto",
        device_map: Any = "auto",
        trust_remote_code: bool = False,
        **options: Any,
    ) -> AutoGuard:
        """Load a checkpoint. Takes AutoModel's arguments (torch_dtype or dtype as a torch dtype or a name,
        device_map as a device; trust_remote_code is accepted and no remote code is ever run) and those of
        `Engine.from_pretrained`."""
        wanted = str(dtype if torch_dtype is None else torch_dtype).removeprefix("torch.")
        device = options.pop("device", device_map) or "auto"
        engine = Engine.from_pretrained(path_or_id, dtype=wanted, device=str(device), **options)
        return AutoGuard(engine, engine.core.runner.config)

    # -- streaming -----------------------------------------------------------------------------------------

    def stream_moderate_from_ids(
        self, token_ids: Any, role: str, stream_state: StreamingState | None = None
    ) -> tuple[Result, StreamingState]:
        """Feed tokens and return the readings of every position fed so far under `role`'s heads.

        Without a state: token_ids is the whole prompt (1-D). With one: the next id, or several. The result has
        four lists with one entry per position: risk_level, risk_prob, category, category_prob, the
        probabilities those of the winning class, rounded to two digits as the remote code does.

        Raises ValueError for another role, and guardengine's errors for bad ids.
        """
        if role not in ("user", "assistant"):
            raise ValueError("Role must be either 'user' or 'assistant'")
        ids = self.core.check_token_ids(_flat(token_ids))
        with self.core.gate:
            state = self._feed(ids, stream_state)
        for result, labels in zip(
            state.results.values(), (state.stream.prompt_labels, state.stream.labels), strict=True
        ):
            for label in labels[len(result["risk_level"]) :]:
                _record(result, label)
        heads: Role = "user" if role == "user" else "assistant"
        return {name: values[:] for name, values in state.results[heads].items()}, state

    def close_stream(self, stream_state: StreamingState) -> None:
        """Free the stream's memory."""
        with self.core.gate:
            self.core.close_stream(_checked_state(stream_state).stream)

    def _feed(self, ids: list[int], stream_state: StreamingState | None) -> StreamingState:
        """Feed ids and compute them; when that fails the ids are taken back, so the call can be repeated."""
        core = self.core
        if stream_state is None:
            state = StreamingState(core.open(_feed_all(ids, 0), Ticket(self._policy)))
            # As the remote code's generator would: a state that nobody holds any more frees its memory.
            weakref.finalize(state, core.abandon, state.stream)
        else:
            state = _checked_state(stream_state)
            core.check_open(state.stream)
            core.accept(state.stream, _feed_all(ids, state.stream.num_tokens))
        try:
            core.run_until_computed([state.stream])
        except BaseException:
            core.rollback(state.stream, len(ids))
            raise
        return state

    # -- whole sequences -----------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        logits_to_keep: int = 0,
        **unused: Any,
    ) -> GuardLogits:
        """Compute all four heads' logits of a batch of sequences.

        Shapes: input_ids [B, T]; attention_mask [B, T], padding on either side, or a causal [B or 1, 1, T, T].
        logits_to_keep=k keeps the last k positions of T, 0 all. Options that only matter for training or
        caching (use_cache, return_dict, ...) are accepted when they ask for nothing.
        """
        asked = {
            name: value
            for name, value in unused.items()
            if value is not None and value is not False and name != "return_dict"
        }
        if asked:
            raise ConfigError(f"forward() does not support {', '.join(sorted(asked))}; drop them")
        if not isinstance(input_ids, Tensor) or input_ids.dim() != 2 or not input_ids.numel():
            shape = list(input_ids.shape) if isinstance(input_ids, Tensor) else type(input_ids).__name__
            raise InvalidTokens(f"input_ids must be a non-empty tensor of shape [B, T], not {shape}")
        if isinstance(logits_to_keep, bool) or not isinstance(logits_to_keep, int) or logits_to_keep < 0:
            raise ConfigError(f"logits_to_keep={logits_to_keep!r}: a whole number, 0 for all, is needed")
        mask = _padding_mask(input_ids, attention_mask)
        heads = self.config.heads
        if heads is None:
            raise ConfigError("AutoGuard needs a Qwen3Guard-Stream checkpoint")
        size, length = input_ids.shape
        sizes = [
            len(names)
            for names in (
                heads.response_risks,
                heads.response_categories,
                heads.query_risks,
                heads.query_categories,
            )
        ]
        logits = torch.zeros(size, length, sum(sizes))
        rows = [self.core.check_token_ids(input_ids[i][mask[i]].tolist()) for i in range(size)]
        with self.core.gate:
            states = run_feeds(self.core, [_feed_all(ids, 0) for ids in rows], self._policy)
        first_query = sizes[0] + sizes[1]
        for row, state in enumerate(states):
            columns = mask[row].nonzero()[:, 0]
            logits[row, columns, :first_query] = _stack_logits(state.labels)
            logits[row, columns, first_query:] = _stack_logits(state.prompt_labels)
        return GuardLogits(*logits[:, -logits_to_keep if logits_to_keep else 0 :].split(sizes, dim=-1))

    __call__ = forward

    def eval(self) -> AutoGuard:
        """Return self: there is no training mode."""
        return self

    @property
    def core(self) -> EngineCore:
        return self.engine.core

    @property
    def device(self) -> torch.device:
        return self.core.runner.device

    @property
    def dtype(self) -> torch.dtype:
        return self.core.runner.dtype


def _feed_all(token_ids: list[int], start: int) -> Feed:
    """Feed raw ids with both roles' labels wanted at every position."""
    positions = range(start, start + len(token_ids))
    roles: tuple[Role, ...] = ("user", "assistant")
    return Feed(token_ids, [Wanted(position, role) for position in positions for role in roles], None)


def _stack_logits(labels: list[Label]) -> Tensor:
    """[positions, risks + categories]."""
    return torch.from_numpy(np.stack([np.concatenate((x.risk_logits, x.category_logits)) for x in labels]))


def _record(result: Result, label: Label) -> None:
    result["risk_level"].append(label.risk)
    result["risk_prob"].append(round(max(label.risk_probs.values()), 2))
    result["category"].append(label.category)
    result["category_prob"].append(round(max(label.category_probs.values()), 2))


def _flat(token_ids: Any) -> Sequence[int]:
    """Accept what the remote code accepts for ids: a 1-D or 0-d tensor, a list, or one int."""
    if isinstance(token_ids, Tensor) and token_ids.dim() == 0:
        token_ids = token_ids[None]
    return [token_ids] if isinstance(token_ids, int) else token_ids


def _checked_state(stream_state: object) -> StreamingState:
    if not isinstance(stream_state, StreamingState):
        raise ConfigError(
            f"stream_state={stream_state!r}: pass back what stream_moderate_from_ids returned, or None to begin"
        )
    return stream_state


def _padding_mask(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """[B, T] bool: which positions are tokens. Raises InvalidTokens for masks that are not padding."""
    if attention_mask is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    if not isinstance(attention_mask, Tensor):
        raise InvalidTokens(f"attention_mask must be a tensor, not {type(attention_mask).__name__}")
    length = input_ids.shape[1]
    mask = attention_mask != 0 if attention_mask.dtype != torch.bool else attention_mask
    if mask.dim() == 4:
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        if mask.shape[1:] == (1, length, length) and bool((mask == causal).all()):
            return torch.ones_like(input_ids, dtype=torch.bool)
        raise InvalidTokens("a 4-D attention_mask must be the causal mask; use [B, T] to mask padding")
    if mask.shape != input_ids.shape:
        raise InvalidTokens(f"attention_mask has shape {list(mask.shape)}, input_ids {list(input_ids.shape)}")
    if not bool(mask.any(dim=1).all()):
        raise InvalidTokens("attention_mask masks a whole sequence; drop that row")
    changes = mask.long().diff(dim=1)
    if bool((((changes == 1).sum(dim=1) + mask[:, 0].long()) > 1).any()):
        raise InvalidTokens("attention_mask must mask padding before and after a row's tokens only")
    return mask
