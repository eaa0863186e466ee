"""How the shell commands ask a running server, on the standard library alone.

A client library takes longer to import than the server takes to answer most commands.
"""

import http.client
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from headwater.server.address import DEFAULT_URL

CONNECT_TIMEOUT_S = 10.0

Json = dict[str, Any]


class ServerError(Exception):
    """The server could not be asked; the message is for the user."""


class MalformedUrl(ServerError):
    """What was given is no address of a server."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What the server said to one request."""

    status_code: int
    text: str

    def json(self) -> Any:
        """Raises `ValueError` if the text is not JSON."""
        return json.loads(self.text)

    @property
    def error(self) -> Json:
        """The server's error object; empty where there is none."""
        try:
            error = self.json()["error"]
        except (ValueError, KeyError, TypeError):
            return {}
        return error if isinstance(error, dict) else {}

    def refusal(self) -> str:
        """Why the server said no, as a sentence."""
        return f"The server answered {self.status_code}: {self.error.get('message') or self.text[:200]}"


class Server:
    """A server by its address. Every request has a connection of its own."""

    def __init__(self, url: str, *, key: str | None = None) -> None:
        """Raises `MalformedUrl`."""
        self.url = url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        try:
            parts = urlsplit(self.url)
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise MalformedUrl(f"{url} is not an address like {DEFAULT_URL}: {error}") from None
        if parts.scheme not in ("http", "https") or not host:
            raise MalformedUrl(f"{url} is not an address like {DEFAULT_URL}.")
        self._base = parts.path
        self._connection_class = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._host, self._port = host, port

    def request(
        self, method: str, path: str, body: Json | None = None, *, timeout_s: float, accept: str = "application/json"
    ) -> Answer:
        """Ask once; `timeout_s` is for the answer. Raises `ServerError`."""
        with self.stream(method, path, body, timeout_s=timeout_s, accept=accept) as response:
            return Answer(response.status, response.read().decode("utf-8", "replace"))

    @contextmanager
    def stream(
        self,
        method: str,
        path: str,
        body: Json | None = None,
        *,
        timeout_s: float | None,
        accept: str = "application/json",
    ) -> Iterator[http.client.HTTPResponse]:
        """The response while it is read; leaving closes the connection. `timeout_s` is for each read."""
        connection = self._connection_class(self._host, self._port, timeout=CONNECT_TIMEOUT_S)
        try:
            self._connect(connection)
            connection.sock.settimeout(timeout_s)
            headers = {"Accept": accept, **self._headers}
            if body is not None:
                headers["Content-Type"] = "application/json"
            data = None if body is None else json.dumps(body).encode()
            connection.request(method, self._base + path, data, headers)
            yield connection.getresponse()
        except TimeoutError:
            raise ServerError(f"{self.url} did not answer within {timeout_s:g} s.") from None
        except (OSError, http.client.HTTPException) as error:
            raise ServerError(f"The connection to {self.url} broke: {error or type(error).__name__}") from None
        finally:
            connection.close()

    def _connect(self, connection: http.client.HTTPConnection) -> None:
        try:
            connection.connect()
        except OSError as error:
            raise ServerError(
                f"No server answers at {self.url} ({error.strerror or error}). "
                "Start one with `headwater serve`, or say where it is with --url or HEADWATER_URL."
            ) from None


class PendingCall:
    """A call in a thread of its own, so that its caller can show something meanwhile and be interrupted."""

    def __init__(self, call: Callable[[], Answer]) -> None:
        self._call = call
        self._answer: Answer | None = None
        self._error: ServerError | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def is_done(self, wait_s: float) -> bool:
        """Whether it has ended, after waiting up to `wait_s` for that."""
        self._thread.join(wait_s)
        return not self._thread.is_alive()

    def result(self) -> Answer:
        """Wait for the end. Raises `ServerError`."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._answer is not None
        return self._answer

    def _run(self) -> None:
        try:
            self._answer = self._call()
        except ServerError as error:
            self._error = error
