"""What the command line costs before a command runs: imports, and processor time."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from guardengine.cli import build_parser

HEAVY = (
    "asyncio",
    "fastapi",
    "httpx",
    "jinja2",
    "matplotlib",
    "numpy",
    "pyarrow",
    "pydantic",
    "ray",
    "safetensors",
    "tokenizers",
    "torch",
    "tqdm",
    "transformers",
    "triton",
    "uvicorn",
    "websockets",
)
MOST_CPU_S = 0.3


def commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    (action,) = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    return dict(action.choices)


class Refusing(BaseHTTPRequestHandler):
    """Refuses everything, as a server does whose API key is another."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        body = b'{"error": {"message": "another key is needed", "code": "invalid_api_key"}}'
        self.send_response(401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def cpu_s(*arguments: str) -> tuple[int, float]:
    """The exit status, and the least processor time of five runs: that of one depends on what else the machine does."""
    times = []
    for _ in range(5):
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "guardengine", *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        times.append(usage.ru_utime + usage.ru_stime)
        if times[-1] < MOST_CPU_S:
            break
    return process.returncode, min(times)


def test_the_parser_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom guardengine.cli import build_parser\nbuild_parser()\n"
        f"print(*sorted(set({HEAVY!r}) & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []


def test_every_command_is_a_file_of_its_own_and_says_what_it_does() -> None:
    found = commands(build_parser())
    assert len(found) == 10
    for name, parser in found.items():
        run = parser.get_default("run")
        assert run.__module__ == f"guardengine.cli.{name.replace('-', '_')}"
        assert parser.description


@pytest.mark.parametrize("command", [None, *commands(build_parser())])
def test_help_comes_at_once(command: str | None) -> None:
    status, seconds = cpu_s(*([] if command is None else [command]), "--help")
    assert status == 0
    assert seconds < MOST_CPU_S


def test_asking_a_server_begins_at_once() -> None:
    with HTTPServer(("127.0.0.1", 0), Refusing) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        status, seconds = cpu_s("moderate", "--url", f"http://127.0.0.1:{server.server_port}", "Hello")
        server.shutdown()
        thread.join()
    assert status == 2
    assert seconds < MOST_CPU_S


def test_importing_the_package_costs_next_to_nothing() -> None:
    code = "import time; t = time.process_time(); import guardengine; print(time.process_time() - t)"
    runs = [
        subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, check=True) for _ in range(3)
    ]
    assert min(float(run.stdout) for run in runs) < 0.1
