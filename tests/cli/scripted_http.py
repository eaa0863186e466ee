"""An HTTP server that answers by script, for tests of commands that talk to a server."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Received:
    """One request as it came."""

    method: str
    path: str
    body: Any
    key: str | None
    accept: str | None


@dataclass
class HttpScript:
    """What to answer by path: (status, text or JSON, delay in seconds). Anything else is a 404."""

    url: str = ""
    answers: dict[str, tuple[int, Any, float]] = field(default_factory=dict)
    held: dict[str, threading.Event] = field(default_factory=dict)  # by path: what its answer waits for
    received: list[Received] = field(default_factory=list)
    num_left: int = 0  # clients that were gone when their answer was ready

    def answer(self, path: str, content: Any, *, status: int = 200, delay_s: float = 0.0) -> None:
        self.answers[path] = (status, content, delay_s)

    def to(self, path: str) -> list[Received]:
        return [request for request in self.received if request.path == path]


@contextmanager
def scripted_http() -> Iterator[HttpScript]:
    """The script of a server on a free port of 127.0.0.1."""
    script = HttpScript()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            text = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            script.received.append(
                Received(
                    method=self.command,
                    path=self.path,
                    body=json.loads(text) if text else None,
                    key=self.headers.get("Authorization"),
                    accept=self.headers.get("Accept"),
                )
            )
            missing = (404, {"error": {"message": "there is no such route"}}, 0.0)
            status, content, delay_s = script.answers.get(self.path, missing)
            time.sleep(delay_s)
            if self.path in script.held:
                script.held[self.path].wait(60)
            data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
            try:
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
            except ConnectionError:
                script.num_left += 1

        do_GET = do_DELETE = do_POST

        def log_message(self, *_: object) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    script.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield script
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
