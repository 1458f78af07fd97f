"""Gen checkpoints with random layers and a fitted head, whose answers mostly follow the grammar and differ between
conversations.

Purely random weights never write "Safety:". Here the layers are random. The rows of the head for the grammar's tokens
are the ridge regression from the layers' output after each token of many random answers to the next token, plus a part
that distinguishes conversations: a direction in which outputs after the same token differ. All other rows are 0.
tests/gen/test_gen.py measures how often a greedy answer then follows the grammar.
"""

from __future__ import annotations

import random
import tempfile
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file

from guardengine import Engine
from guardengine.checkpoint.model_config import RISKS
from guardengine.checkpoint.random_weights import make_checkpoint
from guardengine.core.admission import Ticket
from guardengine.core.feeds import Feed
from guardengine.core.state import Wanted
from guardengine.engine.conversations import Options
from guardengine.errors import ConfigError
from guardengine.gen.grammar import Grammar
from guardengine.gen.parse import NONE, REFUSALS
from guardengine.labels import Role
from guardengine.policy import Policy

NAMED = ("Violent", "PII", "Unethical Acts")
NUM_DIRECTIONS, LIVELY = 12, 2.0
WORDS = [
    "how",
    "do",
    "I",
    "make",
    "steal",
    "a",
    "bomb",
    "cake",
    "friend",
    "please",
    "你好",
    "don't",
    "42",
    "?",
]


def conversations(count: int, seed: int) -> list[list[dict[str, str]]]:
    """Random prompts and responses."""
    rng = random.Random(seed)

    def text() -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, 24)))

    def conversation() -> list[dict[str, str]]:
        prompt = {"role": "user", "content": text()}
        return [prompt] if rng.random() < 0.5 else [prompt, {"role": "assistant", "content": text()}]

    return [conversation() for _ in range(count)]


def random_answer(rng: random.Random, role: str) -> str:
    safety = rng.choice(RISKS)
    chosen = [NONE] if safety == RISKS[0] else rng.sample(NAMED, rng.choice((1, 1, 2)))
    text = f"Safety: {safety}\nCategories: {', '.join(chosen)}"
    return text if role == "user" else f"{text}\nRefusal: {rng.choice(REFUSALS)}"


def make_answering_checkpoint(
    folder: Path, preset: str, *, num_learned: int = 120, seed: int = 0, **overrides: Any
) -> Path:
    """Write a Gen preset with a fitted head into a new folder, which appears only when it is complete.

    Args:
        folder: The new folder.
        preset: A Gen preset.
        num_learned: Number of conversations to which the head is fitted; each is computed once.
        seed: Seed of weights and conversations.
        **overrides: See `make_checkpoint`.

    Raises:
        ConfigError: The folder exists, or an override is not valid.
    """
    if folder.exists():
        raise ConfigError(f"{folder} exists: name a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as parent:
        unfitted = Path(parent, folder.name)
        make_checkpoint(unfitted, preset, seed=seed, tie_word_embeddings=False, **overrides)
        _fit_head(unfitted, num_learned, seed)
        unfitted.rename(folder)
    return folder


def _fit_head(folder: Path, num_learned: int, seed: int) -> None:
    rng = random.Random(seed)
    rows: list[npt.NDArray[np.float32]] = []
    before: list[int] = []  # the token that a row was computed at
    targets: list[int] = []
    with Engine.from_pretrained(folder) as engine:
        core, chat = engine.core, engine.chat
        if chat is None:
            raise ConfigError(f"{folder}: no tokenizer was written; pip install dashscope, and make it again")
        roles: tuple[Role, ...] = get_args(Role)
        grammars = [Grammar(chat.tokenizer.encode_text, role, chat.end_of_turn_id) for role in roles]
        for prompt in engine.conversations.prepare(
            conversations(num_learned, seed + 1), None, Options()
        ).items:
            answer = [*chat.tokenizer.encode_text(random_answer(rng, prompt.role)), chat.end_of_turn_id]
            token_ids = [*prompt.token_ids, *answer]
            first = len(prompt.token_ids) - 1
            wanted = [Wanted(position, "answer") for position in range(first, len(token_ids) - 1)]
            state = core.open(Feed(token_ids, wanted, None), Ticket(Policy.strict()))
            core.run_until_computed([state])
            rows += [hidden.row for hidden in state.hidden]
            before += token_ids[first:-1]
            targets += answer
            core.close_stream(state)
    x = np.stack(rows).astype(np.float64)
    names = sorted(set(targets))
    y = np.eye(len(names))[[names.index(target) for target in targets]]
    fitted = 20 * np.linalg.solve(x.T @ x + 1e-4 * len(x) * np.eye(x.shape[1]), x.T @ y).T
    of_token = {token: x[np.array(before) == token] for token in set(before)}
    means = np.stack([part.mean(axis=0) for part in of_token.values()])
    apart = np.concatenate([part - part.mean(axis=0) for part in of_token.values()])
    apart -= apart @ np.linalg.pinv(means) @ means  # says nothing about the token before
    _, sizes, directions = np.linalg.svd(apart, full_matrices=False)
    choices = {token for grammar in grammars for token in grammar.token_ids}
    for pick, token in enumerate(sorted(choices & set(names))):
        pick %= NUM_DIRECTIONS
        fitted[names.index(token)] += (
            LIVELY * np.sqrt(len(x)) / sizes[pick] * directions[pick] * rng.choice((-1, 1))
        )
    tensors = load_file(folder / "model.safetensors")
    head = torch.zeros_like(tensors["lm_head.weight"])
    head[names] = torch.from_numpy(fitted).to(head.dtype)
    tensors["lm_head.weight"] = head
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
