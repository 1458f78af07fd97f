"""verify_quantization(): the effect of each quantization scheme on this checkpoint, compared with float32.

The checkpoint runs the same conversations in float32 (the standard), in its own dtype (the loss without any
quantization) and under every scheme. Engines run one after the other, so memory is needed for one at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from guardengine.checkpoint.files import open_checkpoint
from guardengine.checkpoint.hub import resolve_checkpoint
from guardengine.checkpoint.model_config import GuardHeadsConfig
from guardengine.core.whole_streams import run_feeds
from guardengine.engine.engine import Engine
from guardengine.errors import CheckpointError, ConfigError
from guardengine.labels import Label, Role, Verdict
from guardengine.measuring.machine import machine_stamp
from guardengine.policy import Policy
from guardengine.verify.corpus import Corpus, load_corpus
from guardengine.verify.error import (
    RoleErrors,
    RoleLogits,
    VerdictErrors,
    role_errors,
    verdict_errors,
)
from guardengine.verify.schemes import SCHEMES

_ROLES: tuple[Role, ...] = ("user", "assistant")
_CONVERSATIONS_AT_A_TIME = 8


@dataclass(frozen=True, slots=True)
class SchemeErrors:
    """The difference between one run and the standard.

    Attributes:
        scheme: A name in SCHEMES, or the checkpoint's own dtype ("bfloat16").
        roles: "user" for prompt labels, "assistant" for response labels.
        verdicts: The difference between the verdicts.
    """

    scheme: str
    roles: dict[Role, RoleErrors]
    verdicts: VerdictErrors

    @property
    def risk_agreement(self) -> float:
        """The lower of the agreements of both roles, so that many good response labels cannot hide bad prompt
        labels."""
        return min(
            errors.risk_agreement for errors in self.roles.values() if errors.risk_agreement is not None
        )


@dataclass(frozen=True, slots=True)
class Report:
    """The result of `verify_quantization`.

    Attributes:
        checkpoint: The path or hub id.
        corpus: The name of the conversations.
        num_conversations: Conversations that were run.
        num_left_out: Conversations that were left out (max_tokens).
        num_tokens: Tokens in the conversations.
        engine: Backend, instruction set, threads and version of the run in float32.
        own_dtype: The run in the checkpoint's own dtype; None where that is float32.
        schemes: The runs under quantization.
    """

    checkpoint: str
    corpus: str
    num_conversations: int
    num_left_out: int
    num_tokens: int
    engine: dict[str, Any]
    own_dtype: SchemeErrors | None
    schemes: tuple[SchemeErrors, ...]

    @property
    def risk_agreement(self) -> float:
        """The lowest agreement of any scheme and role."""
        return min(scheme.risk_agreement for scheme in self.schemes)

    def as_json(self) -> dict[str, Any]:
        """Everything, ready for json.dump, with each scheme's errors relative to those of the own dtype."""
        record = asdict(self)
        for scheme, plain in zip(self.schemes, record["schemes"], strict=True):
            plain["relative_to_own_dtype"] = {role: self.relative(scheme, role) for role in scheme.roles}
        return {"schema": 1, "machine": machine_stamp(), **record}

    def relative(self, scheme: SchemeErrors, role: Role) -> dict[str, float | None]:
        """The errors and flips of a scheme as multiples of the own dtype's; None where that has none."""
        mine = scheme.roles[role]
        own = None if self.own_dtype is None else self.own_dtype.roles[role]
        names = ("max_logit_error", "mean_logit_error", "max_probability_error", "mean_kl", "num_flipped")
        return {
            name: _ratio(getattr(mine, name), None if own is None else getattr(own, name)) for name in names
        }


class _Run(NamedTuple):
    logits: dict[Role, RoleLogits]
    verdicts: list[Verdict]
    stats: dict[str, Any]


def verify_quantization(
    path_or_id: str | Path,
    *,
    schemes: Sequence[str] = tuple(SCHEMES),
    file: Path | None = None,
    max_tokens: int | None = None,
    backend: str = "auto",
    revision: str | None = None,
    num_threads: int | None = None,
    progress: bool = False,
) -> Report:
    """Compare a Stream checkpoint's labels under quantization with its labels in float32, on one backend.

    The numbers hold for these weights and conversations only. On random weights they say that the arithmetic is right,
    not that a trained model tolerates it. Verdicts are those of `Policy.strict()` over prompt and reply together.

    Args:
        path_or_id: A checkpoint folder or hub id.
        schemes: Names in SCHEMES.
        file: Conversations to run, see `load_corpus`. None: a small built-in corpus.
        max_tokens: See `load_corpus`.
        backend: See `Engine.from_pretrained`.
        revision: The revision of the checkpoint on the hub.
        num_threads: See `EngineConfig`.
        progress: Show a progress bar.

    Raises:
        ConfigError: An option is not valid.
        InvalidText: A conversation cannot be rendered.
        CheckpointError: The checkpoint cannot be read, or its logits are not finite in float32.
    """
    _check_schemes(schemes)
    folder = resolve_checkpoint(path_or_id, revision)
    with open_checkpoint(folder) as checkpoint:
        config = checkpoint.config
    heads = config.heads
    if heads is None:
        raise CheckpointError(f"{folder}: a Gen checkpoint has no guard heads; give a Stream checkpoint")
    corpus = load_corpus(folder, config, file=file, max_tokens=max_tokens)
    options = {"float32": {"dtype": "float32"}}
    if config.dtype == "bfloat16":
        options["bfloat16"] = {"dtype": "bfloat16"}
    options |= {name: SCHEMES[name] for name in schemes}
    common = {"backend": backend, "num_threads": num_threads}
    compared: dict[str, SchemeErrors] = {}
    standard: _Run | None = None
    with tqdm(total=len(options) * corpus.num_tokens, unit="token", disable=not progress) as bar:
        for name, chosen in options.items():
            bar.set_description(name)
            run = _run(folder, heads, corpus, {**common, **chosen}, bar)
            if standard is None:
                standard = run
                _check_finite(folder, standard)
            else:
                compared[name] = _compare(name, standard, run, heads)
    if standard is None:
        raise ConfigError("nothing was run")
    return Report(
        checkpoint=str(path_or_id),
        corpus=corpus.name,
        num_conversations=len(corpus.feeds),
        num_left_out=corpus.num_left_out,
        num_tokens=corpus.num_tokens,
        engine={key: standard.stats[key] for key in ("backend", "isa", "num_threads", "version")},
        own_dtype=compared.pop(config.dtype, None),
        schemes=tuple(compared.values()),
    )


def _check_schemes(schemes: Sequence[str]) -> None:
    if isinstance(schemes, str) or not schemes:
        raise ConfigError(f"schemes={schemes!r}: pass a list with one or more of {', '.join(SCHEMES)}")
    for name in schemes:
        if name not in SCHEMES:
            raise ConfigError(f"unknown scheme {name!r}; the schemes are {', '.join(SCHEMES)}")
    if len(set(schemes)) < len(schemes):
        raise ConfigError(f"schemes={', '.join(schemes)}: one is named twice; name each once")


def _run(
    folder: Path, heads: GuardHeadsConfig, corpus: Corpus, options: dict[str, Any], bar: tqdm[Any]
) -> _Run:
    """All labels and verdicts of one engine, which is closed afterwards."""
    policy = Policy.strict()
    longest = max(len(feed.token_ids) for feed in corpus.feeds)
    labels: dict[Role, list[Label]] = {role: [] for role in _ROLES}
    verdicts: list[Verdict] = []
    with Engine.from_pretrained(
        folder, max_model_len=longest, max_num_streams=_CONVERSATIONS_AT_A_TIME, **options
    ) as engine:
        for start in range(0, len(corpus.feeds), _CONVERSATIONS_AT_A_TIME):
            feeds = corpus.feeds[start : start + _CONVERSATIONS_AT_A_TIME]
            for state in run_feeds(engine.core, feeds, policy):
                labels["user"] += state.prompt_labels
                labels["assistant"] += state.labels
                verdicts.append(state.verdict)
            bar.update(sum(len(feed.token_ids) for feed in feeds))
        stats = engine.stats()
    return _Run({role: _logits(found, role, heads) for role, found in labels.items()}, verdicts, stats)


def _logits(labels: list[Label], role: Role, heads: GuardHeadsConfig) -> RoleLogits:
    if not labels:
        categories = heads.query_categories if role == "user" else heads.response_categories
        return RoleLogits(torch.empty(0, len(_risks(role, heads))), torch.empty(0, len(categories)))
    return RoleLogits(
        torch.tensor([label.risk_logits.tolist() for label in labels]),
        torch.tensor([label.category_logits.tolist() for label in labels]),
    )


def _risks(role: Role, heads: GuardHeadsConfig) -> tuple[str, ...]:
    return heads.query_risks if role == "user" else heads.response_risks


def _compare(name: str, standard: _Run, run: _Run, heads: GuardHeadsConfig) -> SchemeErrors:
    roles = {
        role: role_errors(standard.logits[role], run.logits[role], _risks(role, heads)) for role in _ROLES
    }
    return SchemeErrors(name, roles, verdict_errors(standard.verdicts, run.verdicts))


def _check_finite(folder: Path, standard: _Run) -> None:
    for role, logits in standard.logits.items():
        for part in logits:
            if not part.isfinite().all():
                raise CheckpointError(
                    f"{folder}: logits of role {role!r} are not finite in float32, so there is nothing to compare "
                    "with; the weights are broken: download the checkpoint again"
                )


def _ratio(value: float | None, own: float | None) -> float | None:
    return value / own if value is not None and own else None
