"""The soak: its load, and that it finds what it is there to find."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from guardengine import Engine, IntegrityError
from guardengine.bench.__main__ import main
from guardengine.bench.soak.load import Load
from guardengine.bench.soak.run import soak


def load_for(engine: Engine, **changes: float) -> Load:
    options = {"arrivals_per_s": 40.0, "tokens_per_s": 200.0, "idle_s": 0.2, **changes}
    return Load(engine, vocab_size=512, seed=1, **options)  # type: ignore[arg-type]


def run(engine: Engine, load: Load) -> None:
    soak(engine, load, 5.0)
    load.finish()


@pytest.mark.soak
def test_a_soak_is_clean_and_leaves_a_record(checkpoints, tmp_path: Path, capsys) -> None:
    record_path, plot_path = tmp_path / "soak.json", tmp_path / "soak.png"
    arguments = [
        "--soak",
        "2s",
        "--streams",
        "40",
        "--checkpoint",
        str(checkpoints(max_position_embeddings=512)),
    ]
    status = main([*arguments, "--kv-cache-mb", "2", "--json", str(record_path), "--plot", str(plot_path)])
    assert status == 0
    record = json.loads(record_path.read_text())
    assert record["counts"]["labels"] > 0
    assert record["stats"]["tokens_computed"] >= record["counts"]["labels"]
    assert "wrong labels, wrong books | 0" in capsys.readouterr().out
    assert plot_path.stat().st_size > 10_000


@pytest.mark.soak
def test_every_kind_of_event_happens(tiny: Path) -> None:
    with Engine.from_pretrained(tiny, kv_cache_bytes=2**20, max_model_len=256, idle_ttl_s=0.3) as engine:
        load = load_for(engine)
        soak(engine, load, 3.0)
        load.finish()
        counts = load.counts
        for name in ("forks", "rollbacks", "cancelled", "continued", "expired"):
            assert getattr(counts, name), name
        assert engine.stats()["streams_open"] == 0


@pytest.mark.parametrize("damage", ["twice", "missing"])
def test_wrong_labels_are_found(tiny: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    with Engine.from_pretrained(tiny, kv_cache_bytes=2**20, max_model_len=256) as engine:
        load, step = load_for(engine), engine.step
        rng = np.random.default_rng(0)

        def broken():  # type: ignore[no-untyped-def]
            labels = step()
            if labels and rng.random() < 0.1:
                return labels[1:] if damage == "missing" else [labels[0], *labels]
            return labels

        monkeypatch.setattr(engine, "step", broken)
        with pytest.raises(IntegrityError):
            run(engine, load)


def test_wrong_books_are_found(tiny: Path) -> None:
    with Engine.from_pretrained(tiny, kv_cache_bytes=2**20, max_model_len=256) as engine:
        engine.core.pool._free.append(engine.core.pool._free[0])
        with pytest.raises(IntegrityError):
            soak(engine, load_for(engine), 1.0)


@pytest.mark.parametrize("arguments", [["--soak", "soon"], ["--soak", "1s", "--streams", "0"], ["--soak"]])
def test_options_that_cannot_be(arguments: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert "needed" in (err := capsys.readouterr().err) or "expected" in err
