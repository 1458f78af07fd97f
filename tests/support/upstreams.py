"""A stand-in for an LLM's server on a loopback port: OpenAI's chat completions, streamed, with what tests say."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

HANG, BREAK_OFF = object(), object()  # in a reply: go on without a word; drop the connection
_LONGEST_HANG_S = 30.0


class Upstream:
    """replies: for each request in turn its deltas, or an HTTP status to answer with. requests: the bodies that came.
    is_left: set when a client goes away while a reply hangs."""

    def __init__(self, replies: Sequence[Any]) -> None:
        self.replies = list(replies)
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.is_left = threading.Event()
        self._is_over = threading.Event()
        upstream = self

        class Handler(BaseHTTPRequestHandler):
            def do_OPTIONS(self) -> None:
                self.head(204, "text/plain")

            def do_GET(self) -> None:
                self.head(200, "application/json")
                self.wfile.write(json.dumps({"data": [{"id": "fake-llm"}]}).encode())

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                upstream.requests.append(body)
                upstream.keys.append(self.headers["Authorization"])
                upstream.answer(self, upstream.replies.pop(0))

            def head(self, status: int, media_type: str) -> None:
                self.send_response(status)
                self.send_header("Content-Type", media_type)
                self.send_header("Access-Control-Allow-Origin", "*")
                self.send_header("Access-Control-Allow-Headers", "authorization, content-type")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def answer(self, handler: Any, reply: Any) -> None:
        if isinstance(reply, int):
            handler.head(reply, "application/json")
            handler.wfile.write(b'{"error":{"message":"it said <no>","type":"x"}}')
            return
        handler.head(200, "text/event-stream")
        try:
            handler.wfile.write(b": a comment\n\n" + _chunk({"role": "assistant", "content": ""}))
            for delta in reply:
                if delta is BREAK_OFF:
                    return
                until = time.monotonic() + _LONGEST_HANG_S
                while delta is HANG:
                    if self._is_over.wait(0.02) or time.monotonic() > until:
                        return
                    handler.wfile.write(b": still here\n\n")
                handler.wfile.write(_chunk({"content": delta}))
            handler.wfile.write(b'data: {"choices":[],"usage":{}}\n\ndata: [DONE]\n\n')
        except OSError:
            self.is_left.set()

    def stop(self) -> None:
        self._is_over.set()
        self._server.shutdown()
        self._server.server_close()


def _chunk(delta: dict[str, str]) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": None}
    return f"data: {json.dumps({'choices': [choice]}, ensure_ascii=False)}\n\n".encode()


@contextmanager
def upstream(*replies: Any) -> Iterator[Upstream]:
    found = Upstream(replies)
    try:
        yield found
    finally:
        found.stop()
