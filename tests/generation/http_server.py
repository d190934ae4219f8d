"""A small HTTP server on 127.0.0.1 that answers as a test tells it to."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# An answer is a status and what is sent as JSON (a string is sent as it is); with None, the server just hangs up.
Answer = tuple[int, Any] | None


@dataclass
class Calls:
    """Records what was asked, in order, and decides what is answered.

    Attributes:
        url: of the server.
        answer: from route and body to an answer.
        seen: route and body of every call.
    """

    url: str
    answer: Callable[[str, Any], Answer]
    seen: list[tuple[str, Any]] = field(default_factory=list)

    def routes(self) -> list[str]:
        return [route for route, _ in self.seen]


@contextmanager
def http_server(answer: Callable[[str, Any], Answer]) -> Iterator[Calls]:
    class Handler(BaseHTTPRequestHandler):
        def respond(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            calls.seen.append((self.path, body))
            answered = calls.answer(self.path, body)
            if answered is None:
                return
            status, content = answered
            text = content if isinstance(content, str) else json.dumps(content)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        do_GET = do_POST = respond

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    calls = Calls(f"http://127.0.0.1:{server.server_port}", answer)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield calls
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
