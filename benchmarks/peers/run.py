"""The engine against the engines a user would otherwise pick, on this machine, taking turns in one run.

    python benchmarks/peers/run.py --peers llamacpp,openvino,vllm,hf --points 16x256,burst16,prefill2048 --out FILE.json

Needs the extra `peers`, and `python benchmarks/peers/setup.py PEER ...` once. See README.md beside this
file for what is compared and how to read it.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import contenders
import environments
from causal_lm import VOCAB_SIZE, check_sequences, expected_winners, write_causal_lm
from contenders import Contender, Place
from points import name_point, read_point
from results import make_row, markdown
from rounds import Turns, take_turns, tokens_per_stream
from tqdm import tqdm
from worker_process import WorkerFailed, WorkerProcess

from guardengine.bench import report
from guardengine.bench.checkpoints import STREAM_PRESETS, cached_checkpoint
from guardengine.bench.compare import ComparePoint
from guardengine.bench.floor import CostModel
from guardengine.checkpoint.files import open_checkpoint
from guardengine.checkpoint.model_config import ModelConfig
from guardengine.errors import ConfigError, GuardEngineError
from guardengine.measuring import machine
from guardengine.measuring.files import check_writable, write_json
from guardengine.runners.cores import memory_bytes

_BLOCK_SIZE = 16  # the engine's default
_SPARE_BYTES = 2 * 2**30  # for what a peer needs beside weights and KV cache
_COPIES = 2  # of a peer's weights: some keep the file's and a packed one


class Comparison:
    """Measures every pair that was asked for into `record`, and goes on after a contender that fails."""

    def __init__(self, options: argparse.Namespace, place: Place, record: dict[str, Any]) -> None:
        self.options, self.place, self.record = options, place, record
        with open_checkpoint(place.checkpoint) as checkpoint:
            self.config: ModelConfig = checkpoint.config
        self.bar: tqdm[Any] = tqdm(total=0, desc="pairs", mininterval=1)

    def run(self) -> None:
        pairs = len(self.options.points) * len(self.options.engines) * len(self.options.peers)
        self.bar.total = pairs
        with self.bar:
            for point in self.options.points:
                for engine in self.options.engines:
                    self._run_point(point, engine)

    def _run_point(self, point: ComparePoint, engine: Contender) -> None:
        """One engine process for all peers: it takes its contexts back instead of computing them anew."""
        left = list(self.options.peers)
        while left:  # again after an engine that ended in the middle of a pair
            try:
                with self._start(engine, point) as ours:
                    self._load(ours, engine, point)
                    while left and ours.is_alive:
                        self._run_pair(point, engine, ours, left.pop(0))
                        self.bar.update(1)
                        if self.options.out:
                            write_json(self.record, self.options.out)
            except WorkerFailed as error:
                self._fail(engine, point, error)
                self.bar.update(len(left))
                return

    def _run_pair(self, point: ComparePoint, engine: Contender, ours: WorkerProcess, peer: Contender) -> None:
        options = self.options
        try:
            model = self.place.model(peer)
            self._check_memory(model, point, peer)
            with self._start(peer, point) as theirs:
                self._load(theirs, peer, point)
                agreement = self._check(theirs)
                probes = [machine.probe_ceilings(options.threads)]
                turns: Turns = take_turns(
                    ours,
                    theirs,
                    point,
                    options.rounds,
                    vocab_size=VOCAB_SIZE,
                    seed=options.seed,
                    say=self._say,
                )
                probes.append(machine.probe_ceilings(options.threads))
        except (WorkerFailed, GuardEngineError) as error:
            self._fail(peer, point, error)
            return
        row = make_row(self.config, point, engine, peer, turns, probes, agreement)
        self.record["rows"].append({**row, "load_average": os.getloadavg()[0]})

    def _start(self, contender: Contender, point: ComparePoint) -> WorkerProcess:
        self._say(f"{name_point(point)}: starting {contender.name}")
        environment = {"OMP_NUM_THREADS": str(self.options.threads), **self.place.environment(contender)}
        return WorkerProcess(contender.name, self.place.command(contender), environment, self.options.timeout)

    def _load(self, worker: WorkerProcess, contender: Contender, point: ComparePoint) -> None:
        said = worker.request(
            "load",
            options={
                **contender.options,
                **point._asdict(),
                "model": str(self.place.model(contender)),
                "threads": self.options.threads,
                "room": tokens_per_stream(point, self.options.rounds),
                "kv_cache_bytes": self._kv_cache_bytes(contender, point),
            },
        )
        self.record["contenders"][contender.name] = said

    def _check(self, worker: WorkerProcess) -> str | None:
        """Ask a peer for next tokens and compare with transformers' in float32: is it the same model?"""
        winners = worker.request("check", sequences=check_sequences())
        if winners is None:
            return None
        expected = expected_winners(write_causal_lm(self.place.checkpoint, self.place.models / "causal-lm"))
        matches = sum(map(int.__eq__, winners, expected))
        if 2 * matches < len(expected):
            raise WorkerFailed(
                f"only {matches} of {len(expected)} next tokens are those of transformers in float32: it computes "
                "something else, so it is not timed"
            )
        return f"{matches} of {len(expected)}"

    def _kv_cache_bytes(self, contender: Contender, point: ComparePoint) -> int:
        blocks = -(-tokens_per_stream(point, self.options.rounds) // _BLOCK_SIZE)
        cost = CostModel(self.config, contender.weight_bytes, contender.kv_bytes)
        return point.num_streams * blocks * _BLOCK_SIZE * cost.kv_bytes_per_token

    def _check_memory(self, model: Path, point: ComparePoint, peer: Contender) -> None:
        """Refuse what would drive the whole machine out of memory, the engine being there already."""
        files = [file for file in model.rglob("*") if file.is_file()] if model.is_dir() else [model]
        needed = _COPIES * sum(file.stat().st_size for file in files) + self._kv_cache_bytes(peer, point)
        free = memory_bytes("MemAvailable")
        if needed + _SPARE_BYTES > free:
            raise ConfigError(
                f"about {(needed + _SPARE_BYTES) / 1e9:.1f} GB are needed beside the engine, {free / 1e9:.1f} GB are "
                "free; leave this point out or use fewer streams"
            )

    def _fail(self, contender: Contender, point: ComparePoint, error: Exception) -> None:
        self.record["failures"].append(
            {"contender": contender.name, "point": name_point(point), "reason": str(error)}
        )
        tqdm.write(f"{contender.name}, {name_point(point)}: {error}", file=sys.stderr)

    def _say(self, text: str) -> None:
        self.bar.set_postfix_str(text)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; argparse exits with status 2 and the reason when it is wrong."""
    parser = argparse.ArgumentParser(
        prog="python benchmarks/peers/run.py",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__,
    )
    parser.add_argument(
        "--peers",
        default="llamacpp,openvino,vllm,hf",
        help=f"PEER or PEER:SETTING, by commas; all: {', '.join(contenders.PEERS)}",
    )
    parser.add_argument(
        "--engines", default="bf16", help="bf16, fp32, or any quantization of the engine, by commas"
    )
    parser.add_argument(
        "--points",
        default="1x256,16x256,64x256,16x1024,64x1024,burst16,prefill2048",
        help="STREAMSxCONTEXT, burstTOKENS, prefillTOKENS, by commas (%(default)s)",
    )
    parser.add_argument("--rounds", type=int, default=7, help="turns a pair, after a warm-up (%(default)s)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: cores")
    parser.add_argument("--seed", type=int, default=0, help="of the token ids (%(default)s)")
    parser.add_argument(
        "--timeout", type=float, default=1800.0, help="seconds an answer may take (%(default)g)"
    )
    parser.add_argument(
        "--preset", choices=STREAM_PRESETS, default="stream-0.6b", help="random weights (%(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE.json", help="write the record, anew after every pair"
    )
    for peer in environments.RECIPES:
        parser.add_argument(
            f"--{peer}-python", type=Path, metavar="PATH", help="instead of setup.py's interpreter"
        )
    options = parser.parse_args(arguments)
    for name, least in (("rounds", 1), ("threads", 1), ("seed", 0)):
        if getattr(options, name) < least:
            parser.error(f"--{name} {getattr(options, name)}: at least {least} is needed")
    if not 0 < options.timeout < 1e6:
        parser.error(f"--timeout {options.timeout}: seconds above 0 are needed")
    try:
        options.peers = contenders.choose_peers(options.peers)
        options.engines = [contenders.choose_engine(name) for name in options.engines.split(",")]
        options.points = [read_point(text) for text in options.points.split(",")]
        if options.out:
            check_writable(options.out)
    except ConfigError as error:
        parser.error(str(error))
    return options


def run(options: argparse.Namespace, arguments: Sequence[str]) -> dict[str, Any]:
    """Measure what the options ask for; returns the record. Raises GuardEngineError for weights that cannot be made."""
    checkpoint = cached_checkpoint(options.preset)
    chosen: Mapping[str, Path | None] = {
        peer: getattr(options, f"{peer}_python") for peer in environments.RECIPES
    }
    place = Place(
        checkpoint,
        environments.peers_folder() / "models" / checkpoint.name,
        {peer: path for peer, path in chosen.items() if path},
    )
    record = report.stamp(arguments, options.seed) | {
        "command": shlex.join(["python", "benchmarks/peers/run.py", *arguments]),
        "model": f"{options.preset} (random weights)",
        "threads": options.threads,
        "rounds": options.rounds,
        "contenders": {},
        "rows": [],
        "failures": [],
    }
    Comparison(options, place, record).run()
    return record


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, also where peers failed: the table says so; 2 for what cannot be run; 130 after Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        record = run(options, arguments)
        print(markdown(record))
        if options.out:
            write_json(record, options.out)
    except GuardEngineError as error:
        print(f"peers: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("peers: interrupted; --out holds the pairs that were done", file=sys.stderr)
        return 130
    return 0


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
