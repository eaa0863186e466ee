"""A server that runs out of file descriptors in spite of all bounds comes back, without a storm in its log."""

import contextlib
import socket
import subprocess
import sys
import time

import httpx
import pytest

pytestmark = pytest.mark.slow
SERVER = """
import asyncio, logging, resource, socket
from headwater.http_api.connection import ConnectionLimits
from headwater.http_api.http_server import HttpServer

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        for kind in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{kind}.complete"})
        return
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})

logging.basicConfig()
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60))
limits = ConnectionLimits(max_connections=10_000, header_timeout_s=1.0)  # far more than there are descriptors
asyncio.run(HttpServer(app, limits, log_level="warning").serve(sockets=[listener]))
"""


def test_a_server_out_of_descriptors_complains_once_and_comes_back() -> None:
    with subprocess.Popen([sys.executable, "-c", SERVER], stdout=-1, stderr=-1, text=True) as server:
        try:
            assert server.stdout is not None
            assert server.stderr is not None
            address = ("127.0.0.1", int(server.stdout.readline()))
            url = f"http://127.0.0.1:{address[1]}/"
            with contextlib.ExitStack() as stack:
                for _ in range(300):
                    stack.enter_context(socket.create_connection(address, timeout=30))
                time.sleep(1)
            deadline_s = time.monotonic() + 60
            answer = None
            while answer is None and time.monotonic() < deadline_s:
                with contextlib.suppress(httpx.HTTPError):
                    answer = httpx.get(url, timeout=5, trust_env=False)
            assert answer is not None
            assert answer.text == "ok"
        finally:
            server.kill()
        told = server.stderr.read()
    assert "cannot accept connections" in told, "the test did not get there"
    assert "Traceback" not in told
    assert len(told.splitlines()) < 10
