"""AutoGuard: replaces the model class of the released Qwen3Guard-Stream remote code, without changes to the code
around it.

It has the same methods, the same dict of four lists and the same output fields. Inside, a stream of an engine replaces
the repeated run over the whole conversation, so the cost of a token does not grow with the number of tokens before it.

Source: the README and the evaluation scripts of QwenLM/Qwen3Guard, which show how the remote code is called.
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

from guardengine import checks
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
    """The state of one conversation, which `AutoGuard.stream_moderate_from_ids` returns: pass it to the next call, and
    to `AutoGuard.close_stream` at the end."""

    stream: StreamState = field(repr=False)
    results: dict[Role, Result] = field(
        default_factory=lambda: {"user": _empty_result(), "assistant": _empty_result()}, repr=False
    )


@dataclass(frozen=True, slots=True)
class GuardLogits:
    """The logits of all four heads at every position of a batch. They are 0 where attention_mask is 0.

    B is the number of sequences, T the number of kept positions; the classes are in the order of config.json.

    Attributes:
        risk_level_logits: float32 [B, T, response risks].
        category_logits: float32 [B, T, response categories].
        query_risk_level_logits: float32 [B, T, query risks].
        query_category_logits: float32 [B, T, query categories].
    """

    risk_level_logits: Tensor
    category_logits: Tensor
    query_risk_level_logits: Tensor
    query_category_logits: Tensor


class AutoGuard:
    """The public behaviour of the released model class. Made by `from_pretrained`.

    Attributes:
        engine: The engine that computes the labels.
        config: The checkpoint's configuration.
        response_risk_level_map: Index of a class -> name of a response risk.
        response_category_map: Index of a class -> name of a response category.
        query_risk_level_map: Index of a class -> name of a query risk.
        query_category_map: Index of a class -> name of a query category.
    """

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
        """Load a Qwen3Guard-Stream checkpoint.

        Args:
            path_or_id: A checkpoint folder, or an id on the Hugging Face hub.
            torch_dtype: A torch dtype or its name; counts before `dtype`.
            dtype: A torch dtype or its name, or "auto".
            device_map: A device such as "cpu" or "cuda:0", or "auto".
            trust_remote_code: Accepted because callers pass it. No remote code is ever run.
            **options: Further options of `Engine.from_pretrained`.

        Raises:
            CheckpointError: The checkpoint cannot be read.
            ConfigError: It is not a Stream checkpoint, or an option is not valid.
        """
        dtype_name = str(dtype if torch_dtype is None else torch_dtype).removeprefix("torch.")
        device = options.pop("device", device_map) or "auto"
        engine = Engine.from_pretrained(path_or_id, dtype=dtype_name, device=str(device), **options)
        return AutoGuard(engine, engine.core.runner.info.config)

    # -- streaming -----------------------------------------------------------------------------------------

    def stream_moderate_from_ids(
        self, token_ids: Any, role: str, stream_state: StreamingState | None = None
    ) -> tuple[Result, StreamingState]:
        """Feed tokens, and return the labels of every position fed so far, from the heads of `role`.

        Args:
            token_ids: Without a state the whole prompt, a 1-D tensor or a list. With a state the next id, or several.
            role: "user" for the query heads, "assistant" for the response heads.
            stream_state: The state that the previous call returned; None begins a conversation.

        Returns:
            A dict of four lists, with one entry for each position so far: risk_level and category are names, risk_prob
                and category_prob the probabilities of these classes, rounded to two digits as in the remote code. And
                the state.

        Raises:
            ValueError: Another role.
            InvalidTokens: The ids are not whole numbers of the vocabulary.
            StreamTooLong: The conversation is longer than max_model_len.
            StreamClosed: The state was closed.
            Overloaded: There is no room. Nothing has changed; the call can be repeated.
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
        """Free the memory of a conversation.

        Args:
            stream_state: The state that `stream_moderate_from_ids` returned.

        Raises:
            ConfigError: It is something else.
        """
        with self.core.gate:
            self.core.close_stream(_checked_state(stream_state).stream)

    def _feed(self, ids: list[int], stream_state: StreamingState | None) -> StreamingState:
        """Feed ids and compute them. When that fails the ids are removed again, so that the call can be repeated."""
        core = self.core
        if stream_state is None:
            state = StreamingState(core.open(_feed_all(ids, 0), Ticket(self._policy)))
            # A state that is no longer referenced frees its memory, as the generator of the remote code does.
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
        """Compute the logits of all four heads for a batch of sequences.

        Args:
            input_ids: Whole numbers, shape [B, T].
            attention_mask: Shape [B, T], 0 for padding before or after a row's tokens; or the causal mask, shape [B or
                1, 1, T, T]. None: no padding.
            logits_to_keep: Keep the logits of the last so many positions of T; 0 keeps all.
            **unused: Options that only matter for training or caching (use_cache, return_dict, ...). They are accepted
                when they ask for nothing.

        Returns:
            Four float32 tensors, each [B, T or logits_to_keep, classes].

        Raises:
            InvalidTokens: An id is not in the vocabulary, or the shape or the mask is another one than above.
            ConfigError: An option is not supported.
            StreamTooLong: A row is longer than max_model_len.
            Overloaded: There is no room for even one row.
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
        checks.whole_number("logits_to_keep", logits_to_keep, 0)
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
        """Return self. The model has no training mode."""
        return self

    @property
    def core(self) -> EngineCore:
        """The core of the engine. Internal."""
        return self.engine.core

    @property
    def device(self) -> torch.device:
        """The device that holds the weights."""
        return self.core.runner.info.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.core.runner.info.dtype


def _feed_all(token_ids: list[int], start: int) -> Feed:
    """A feed of raw ids that asks for the labels of both roles at every position."""
    positions = range(start, start + len(token_ids))
    roles: tuple[Role, ...] = ("user", "assistant")
    return Feed(token_ids, [Wanted(position, role) for position in positions for role in roles], None)


def _stack_logits(labels: list[Label]) -> Tensor:
    """The logits of some labels as a tensor [positions, risks + categories]."""
    return torch.from_numpy(np.stack([np.concatenate((x.risk_logits, x.category_logits)) for x in labels]))


def _record(result: Result, label: Label) -> None:
    result["risk_level"].append(label.risk)
    result["risk_prob"].append(round(max(label.risk_probs.values()), 2))
    result["category"].append(label.category)
    result["category_prob"].append(round(max(label.category_probs.values()), 2))


def _flat(token_ids: Any) -> Sequence[int]:
    """The ids in each form that the remote code accepts (a 1-D or 0-d tensor, a list, one int) as a sequence."""
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
    """A bool tensor [B, T], true where there are tokens. Raises InvalidTokens for masks that mask anything but
    padding."""
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
