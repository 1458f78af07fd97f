"""benchmarks/peers without any peer: the protocol with fake workers, the files that are written, the table."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from guardengine.bench.compare import ComparePoint
from guardengine.checkpoint.model_config import ModelConfig
from guardengine.errors import ConfigError
from guardengine.measuring import machine

FOLDER = Path(__file__).parents[2] / "benchmarks" / "peers"
if str(FOLDER) not in sys.path:
    sys.path.append(str(FOLDER))  # the scripts import each other by name, as when they are run

import causal_lm  # noqa: E402
import contenders  # noqa: E402
import points  # noqa: E402
import results  # noqa: E402
import rounds  # noqa: E402
import run as peers_run  # noqa: E402
from worker_process import WorkerFailed, WorkerProcess  # noqa: E402

pytestmark = pytest.mark.slow

CEILINGS = machine.Ceilings(2, 20e9, 18e9, 2**20, 100e9, 0.0, 400e9, "avx2")

# A worker that does as its options say: what it is asked goes to a file, one line each.
FAKE = f"""
import os, sys, time
sys.path.insert(0, {str(FOLDER)!r})
from protocol import serve

class Fake:
    def __init__(self, options):
        print("a library talks to stdout")
        os.write(1, b"and C code too\\n")
        self.options = options
    def describe(self):
        return {{"fake": "1.0"}}
    def check(self, sequences):
        return self.options.get("winners", [sum(ids) % 7 for ids in sequences])
    def prepare(self, prompts):
        self.log(f"prepare {{[len(prompt) for prompt in prompts]}}")
    def advance(self, chunks):
        self.log(f"advance {{[len(ids) for ids in chunks]}}")
        fault = self.options.get("fault")
        if fault == "raises": raise MemoryError("no room for KV")
        if fault == "exits": sys.stderr.write("bad weights\\n"); sys.stderr.flush(); os._exit(3)
        if fault == "illegal": os.kill(os.getpid(), {int(signal.SIGILL)})
        if fault == "hangs": time.sleep(60)
        if fault == "forgets": return []
        return [0] * len(chunks)
    def log(self, text):
        with open(self.options["log"], "a") as file:
            file.write(f"{{self.options['name']}} {{text}}\\n")

serve(Fake)
"""
GARBAGE = "import sys; sys.stdin.readline(); print('Segmentation fault (core dumped)', flush=True); sys.stdin.read()"
DEAF = "import time; time.sleep(60)"
QUIET = {"say": lambda text: None}


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., WorkerProcess]]:
    """start(name, fault=...) -> a loaded fake worker."""
    started: list[WorkerProcess] = []

    def start(name: str, source: str = FAKE, timeout_s: float = 20.0, **options: Any) -> WorkerProcess:
        worker = WorkerProcess(name, [sys.executable, "-c", source], {}, timeout_s)
        started.append(worker)
        if source is FAKE:
            options |= {"name": name, "log": str(tmp_path / "log")}
            assert worker.request("load", options=options) == {"fake": "1.0"}
        return worker

    yield start
    for worker in started:
        worker.close(at_once=True)


def is_running(worker: WorkerProcess) -> bool:
    try:
        os.killpg(worker._process.pid, 0)
    except ProcessLookupError:
        return False
    return True


# -- turns and workers --------------------------------------------------------------------------------------


def test_both_sides_take_turns_and_begin_in_turn(start: Callable[..., WorkerProcess], tmp_path: Path) -> None:
    turns = rounds.take_turns(
        start("engine"), start("peer"), ComparePoint(2, 8, 3), 3, vocab_size=50, seed=0, **QUIET
    )
    done = [line.split(maxsplit=1) for line in (tmp_path / "log").read_text().splitlines()]
    assert [name for name, what in done if what == "prepare [8, 8]"] == ["engine", "peer"]
    order = [name for name, what in done if what == "advance [3, 3]"]
    assert order == ["engine", "peer", "peer", "engine"] * 2  # one round is the warm-up
    assert len(turns.engine_s) == len(turns.peer_s) == 3
    assert min(turns.engine_s + turns.peer_s) > 0


def test_every_prompt_begins_on_an_empty_stream(start: Callable[..., WorkerProcess], tmp_path: Path) -> None:
    rounds.take_turns(
        start("engine"), start("peer"), ComparePoint(1, 0, 9), 1, vocab_size=50, seed=0, **QUIET
    )
    done = [line.split(maxsplit=1)[1] for line in (tmp_path / "log").read_text().splitlines()]
    assert done == ["prepare [0]"] * 2 + ["prepare [0]", "advance [9]"] * 4


@pytest.mark.parametrize(
    ("fault", "reason", "survives"),
    [
        ("raises", "MemoryError: no room for KV", True),
        ("forgets", "0 results came for 2 streams", True),
        ("exits", "ended with status 3: bad weights", False),
        ("illegal", r"SIGILL \(it uses instructions that this machine lacks\)", False),
    ],
)
def test_a_failing_worker_is_a_reason(
    start: Callable[..., WorkerProcess], fault: str, reason: str, survives: bool
) -> None:
    worker = start("peer", fault=fault)
    with pytest.raises(WorkerFailed, match=reason):
        worker.request("advance", chunks=[[1], [2]])
    assert worker.is_alive == survives == is_running(worker)


@pytest.mark.parametrize("source", [FAKE, DEAF])
def test_a_hanging_worker_is_killed(start: Callable[..., WorkerProcess], source: str) -> None:
    worker = start("peer", source, fault="hangs")
    worker.timeout_s = 0.3
    chunks = (
        [[1]] if source is FAKE else [[1] * 10**6]
    )  # more than a pipe holds, for a worker that reads nothing
    with pytest.raises(WorkerFailed, match=r"no answer within 0\.3 s; raise --timeout"):
        worker.request("advance", chunks=chunks)
    assert not is_running(worker)
    with pytest.raises(WorkerFailed, match="has ended"):
        worker.request("advance", chunks=[[1]])


def test_garbage_is_not_an_answer(start: Callable[..., WorkerProcess]) -> None:
    worker = start("peer", GARBAGE)
    with pytest.raises(WorkerFailed, match=r"'Segmentation fault \(core dumped\)' came instead"):
        worker.request("check", sequences=[])
    assert not is_running(worker)


def test_a_worker_that_cannot_start_is_a_reason() -> None:
    with pytest.raises(WorkerFailed, match="cannot be started"):
        WorkerProcess("peer", ["/no/such/python"], {}, 1.0)


def test_waiting_workers_sleep(start: Callable[..., WorkerProcess]) -> None:
    worker = start("peer")
    before = worker.cpu_seconds()
    time.sleep(0.3)
    assert worker.cpu_seconds() - before <= 0.02


def test_the_end_of_the_orchestrator_ends_its_workers(tmp_path: Path) -> None:
    """Ctrl-C, and a kill that leaves no time to clean up."""
    (tmp_path / "fake.py").write_text(FAKE)
    source = f"""
import sys; sys.path.insert(0, {str(FOLDER)!r})
from worker_process import WorkerProcess
import time
with WorkerProcess("peer", [sys.executable, {str(tmp_path / "fake.py")!r}], {{}}, 20.0) as worker:
    worker.request("load", options={{}})
    print(worker._process.pid, flush=True)
    time.sleep(60)
"""
    for number in (signal.SIGINT, signal.SIGKILL):
        with subprocess.Popen(
            [sys.executable, "-c", source], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as process:
            assert process.stdout is not None
            pid = int(process.stdout.readline())
            process.send_signal(number)
        deadline = time.monotonic() + 10
        while Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes():
            assert time.monotonic() < deadline, f"worker {pid} is still there"
            time.sleep(0.02)


# -- the whole run ------------------------------------------------------------------------------------------


@pytest.fixture
def comparison(
    checkpoints: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, Any]]:
    """comparison(peers) runs fake contenders, each (name, fault)."""
    monkeypatch.setattr(machine, "probe_ceilings", lambda num_threads: CEILINGS)
    checkpoint = checkpoints(vocab_size=2048, dtype="bfloat16")
    monkeypatch.setattr(peers_run, "expected_winners", lambda folder: [1, 2, 3, 4])
    monkeypatch.setattr(contenders.Place, "command", lambda self, contender: [sys.executable, "-c", FAKE])

    def comparison(*peers: tuple[str, dict[str, Any]]) -> dict[str, Any]:
        def fake(name: str, **options: Any) -> contenders.Contender:
            options = {"winners": [1, 2, 3, 9], "name": name, "log": str(tmp_path / "log")} | options
            return contenders.Contender(name, "", "checkpoint", options)

        arguments = [
            "--points",
            "2x8",
            "--rounds",
            "2",
            "--threads",
            "2",
            "--out",
            str(tmp_path / "out.json"),
        ]
        options = peers_run.parse(arguments)
        options.engines = [fake("engine:bf16")]
        options.peers = [fake(name, **changes) for name, changes in peers]
        monkeypatch.setattr(peers_run, "cached_checkpoint", lambda preset: checkpoint)
        monkeypatch.setenv("GUARDENGINE_CACHE", str(tmp_path))
        record = peers_run.run(options, arguments)
        assert json.loads((tmp_path / "out.json").read_text())["rows"] == record["rows"]
        return record

    return comparison


def test_a_run_goes_on_after_a_peer_that_fails(comparison: Callable[..., dict[str, Any]]) -> None:
    record = comparison(
        ("a:raises", {"fault": "raises"}),
        ("b:exits", {"fault": "exits"}),
        ("c:another-model", {"winners": [7, 7, 7, 4]}),
        ("d:good", {}),
    )
    assert [row["peer"]["name"] for row in record["rows"]] == ["d:good"]
    assert [failure["contender"] for failure in record["failures"]] == [
        "a:raises",
        "b:exits",
        "c:another-model",
    ]
    assert "only 1 of 4 next tokens" in record["failures"][2]["reason"]
    row = record["rows"][0]
    assert row["next_tokens_as_expected"] == "3 of 4"
    assert row["engine_is_faster_by"]["p50"] == pytest.approx(
        sum(p / e for p, e in zip(row["peer"]["rounds_ms"], row["engine"]["rounds_ms"], strict=True)) / 2
    )
    text = results.markdown(record)
    assert "| d:good |" in text
    assert "- b:exits, 2 x 8: b:exits `advance`: ended with status 3: bad weights" in text
    assert "d:good: fake 1.0" in text


def test_shares_of_the_floor_are_those_of_the_weight_format(tiny: Path) -> None:
    config = ModelConfig.from_dict(json.loads((tiny / "config.json").read_text()))
    engine, peer = contenders.choose_engine("bf16"), contenders.PEERS["llamacpp:q8_0"]
    turns = rounds.Turns([0.01, 0.02, 0.03], [0.03, 0.02, 0.03], 0.0)
    row = results.make_row(config, ComparePoint(4, 16, 1), engine, peer, turns, [CEILINGS] * 2, None)
    assert row["engine"]["tokens_per_s"] == pytest.approx(4 / 0.02)
    assert row["engine_is_faster_by"]["p50"] == 1.0  # of 3, 1, 1: by round, not 0.03 / 0.02
    assert row["engine"]["share_of_floor"] == pytest.approx(row["engine"]["floor_ms"] / 20)
    assert row["engine"]["ceilings"]["flops_per_s"] == 100e9
    assert row["peer"]["ceilings"]["flops_per_s"] == 400e9  # int8 dot products
    assert row["peer"]["floor_ms"] < row["engine"]["floor_ms"]


# -- the command line ---------------------------------------------------------------------------------------


def test_points_are_read() -> None:
    texts = ["16x1024", "burst16", "prefill2048"]
    assert [points.read_point(text) for text in texts] == [(16, 1024, 1), (1, 256, 16), (1, 0, 2048)]
    named = [points.name_point(points.read_point(text)) for text in texts]
    assert named == ["16 x 1024", "1 x 256 + 16", "prefill 2048"]
    for text in ("", "16", "0x256", "16x", "burst", "prefill-1", "99999999x1"):
        with pytest.raises(ConfigError, match="STREAMSxCONTEXT"):
            points.read_point(text)


def test_peers_and_engines_are_chosen() -> None:
    names = [contender.name for contender in contenders.choose_peers("llamacpp:q8_0, openvino")]
    assert names == ["llamacpp:q8_0", "openvino:f16", "openvino:int8"]
    for text in ("tensorflow", ","):
        with pytest.raises(ConfigError, match="peer"):
            contenders.choose_peers(text)
    assert contenders.choose_engine("bf16").options == {"dtype": "bfloat16", "quantization": None}
    assert contenders.choose_engine("w8a8").options == {"dtype": "bfloat16", "quantization": "w8a8"}


def test_a_missing_interpreter_names_the_set_up(tiny: Path, tmp_path: Path) -> None:
    place = contenders.Place(tiny, tmp_path, {"vllm": tmp_path / "python"})
    with pytest.raises(ConfigError, match=r"peers/setup\.py vllm"):
        place.command(contenders.PEERS["vllm:eager"])
    for contender in contenders.PEERS.values():
        assert (FOLDER / contender.script).is_file()


# -- the files ----------------------------------------------------------------------------------------------


@pytest.fixture
def language_model(checkpoints: Callable[..., Path], tmp_path: Path) -> Path:
    source = checkpoints(vocab_size=2048, dtype="bfloat16")
    return causal_lm.write_causal_lm(source, tmp_path / "causal-lm")


def test_the_language_model_has_the_backbone_and_a_small_vocabulary(
    checkpoints: Callable[..., Path], language_model: Path
) -> None:
    source = checkpoints(vocab_size=2048, dtype="bfloat16")
    with (
        safe_open(source / "model.safetensors", "pt") as whole,
        safe_open(language_model / "model.safetensors", "pt") as part,
    ):
        names = set(part.keys())
        assert names == {name for name in whole.keys() if name.startswith("model.")}  # noqa: SIM118
        assert part.get_slice(causal_lm.EMBEDDING).get_shape() == [1024, 64]
        for name in names:
            assert torch.equal(
                part.get_tensor(name), whole.get_tensor(name)[: 1024 if "embed" in name else None]
            )
    assert causal_lm.write_causal_lm(source, language_model) == language_model  # once is enough
    assert not list(language_model.parent.glob(".causal-lm*"))


def test_transformers_reads_the_language_model(language_model: Path) -> None:
    pytest.importorskip("transformers")
    winners = causal_lm.expected_winners(language_model)
    assert len(winners) == len(causal_lm.check_sequences())
    assert max(winners) < 1024
    assert winners == causal_lm.expected_winners(language_model)  # from its file


@pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="gguf is not installed")
@pytest.mark.parametrize(("weights", "largest_error"), [("bf16", 0.0), ("q8_0", 0.01)])
def test_gguf_holds_the_same_tensors(
    language_model: Path, tmp_path: Path, weights: str, largest_error: float
) -> None:
    import gguf
    from gguf_file import write_gguf

    reader = gguf.GGUFReader(write_gguf(language_model, tmp_path / "model.gguf", weights))
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    pairs = {
        "token_embd.weight": causal_lm.EMBEDDING,
        "output_norm.weight": "model.norm.weight",
        "blk.2.attn_norm.weight": "model.layers.2.input_layernorm.weight",
        "blk.2.attn_q.weight": "model.layers.2.self_attn.q_proj.weight",
        "blk.2.attn_k.weight": "model.layers.2.self_attn.k_proj.weight",
        "blk.2.attn_v.weight": "model.layers.2.self_attn.v_proj.weight",
        "blk.2.attn_output.weight": "model.layers.2.self_attn.o_proj.weight",
        "blk.2.attn_q_norm.weight": "model.layers.2.self_attn.q_norm.weight",
        "blk.2.attn_k_norm.weight": "model.layers.2.self_attn.k_norm.weight",
        "blk.2.ffn_norm.weight": "model.layers.2.post_attention_layernorm.weight",
        "blk.2.ffn_gate.weight": "model.layers.2.mlp.gate_proj.weight",
        "blk.2.ffn_up.weight": "model.layers.2.mlp.up_proj.weight",
        "blk.2.ffn_down.weight": "model.layers.2.mlp.down_proj.weight",
    }
    assert len(tensors) == 2 + 3 * 11
    with safe_open(language_model / "model.safetensors", "pt") as part:
        for name, stored in pairs.items():
            wanted, found = part.get_tensor(stored).float(), tensors[name]
            assert list(reversed(found.shape.tolist())) == list(wanted.shape)  # GGUF counts from the inside
            values = torch.from_numpy(gguf.quants.dequantize(found.data, found.tensor_type).copy())
            error = (values.view(wanted.shape) - wanted).abs().max()
            assert error <= (largest_error * wanted.abs().max() if wanted.dim() == 2 else 0.0)
    assert reader.get_field("qwen3.attention.key_length").contents() == 32
    assert reader.get_field("qwen3.vocab_size").contents() == 1024
