"""A judge on the loopback that answers as a test wants: truly, wrongly, late or not at all."""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from maestro_fast.records import RewardBatch
from maestro_fast.rewards import RewardSet

Body = dict[str, Any]


@dataclass(frozen=True)
class Reply:
    """What goes over the wire: a status with a payload, of which only the first ``sent`` bytes may leave."""

    payload: Any
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    sent: int | None = None


HANG, RESET = object(), object()
Answerer = Callable[[Body], Any]


def completion(text: Any, **message: Any) -> dict[str, Any]:
    """A chat completion of 7 + 3 tokens."""
    return {
        "id": "1",
        "object": "chat.completion",
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": text, **message}, "finish_reason": "stop"}
        ],
        "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10},
    }


class JudgeServer(ThreadingHTTPServer):
    """Gives each request to ``answer``, which returns a text, a ``Reply``, ``HANG`` or ``RESET``.

    Attributes:
        bodies, times, keys: the JSON of the requests, when they came, and what they had as authorization.
        most: the greatest number of requests at once.
        pause: the seconds that each request takes.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, answer: Answerer) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer, self.pause = answer, 0.0
        self.bodies: list[Body] = []
        self.times: list[float] = []
        self.keys: list[str | None] = []
        self.most = self._now = 0
        self.over, self._lock = threading.Event(), threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    @contextmanager
    def counted(self, body: Body, key: str | None) -> Iterator[None]:
        with self._lock:
            self.bodies.append(body)
            self.times.append(time.monotonic())
            self.keys.append(key)
            self._now += 1
            self.most = max(self.most, self._now)
        try:
            yield
        finally:
            with self._lock:
                self._now -= 1

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: JudgeServer

    def do_GET(self) -> None:
        self._send(Reply({"object": "list", "data": [{"id": "small-judge", "object": "model"}]}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.counted(body, self.headers["Authorization"]):
            if self.server.pause:
                self.server.over.wait(self.server.pause)
            answer = self.server.answer(body)
            if answer is HANG:
                self.server.over.wait(30)
        if answer is HANG or answer is RESET:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
        else:
            self._send(answer if isinstance(answer, Reply) else Reply(completion(answer)))

    def _send(self, reply: Reply) -> None:
        content = reply.payload if isinstance(reply.payload, bytes) else json.dumps(reply.payload).encode()
        self.send_response(reply.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content if reply.sent is None else content[: reply.sent])
        self.close_connection = reply.sent is not None

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is printed."""


@contextmanager
def serving(answer: Answerer) -> Iterator[JudgeServer]:
    """A server that runs as long as the block."""
    with JudgeServer(answer) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.over.set()
            server.shutdown()
            thread.join(10)


def asked(body: Body) -> str:
    """The last message of a request."""
    return str(body["messages"][-1]["content"])


def values(reward: Any, batch: RewardBatch) -> list[float | None]:
    """The values of a reward through a set, as in a run. None stands for NaN."""
    column = RewardSet([reward])(batch)[:, 0].tolist()
    return [None if value != value else round(value, 6) for value in column]
