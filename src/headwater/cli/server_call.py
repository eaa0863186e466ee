"""HTTP calls of the shell commands, with the standard library alone.

Importing a client library takes longer than most answers of the server.
"""

import http.client
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode, urlsplit

from headwater.server.address import DEFAULT_URL

CONNECT_TIMEOUT_S = 10.0

Json = dict[str, Any]


class ServerError(Exception):
    """The server could not be reached; the message is for the user."""


class MalformedUrl(ServerError):
    """The given URL is not the address of a server."""


@dataclass(frozen=True, slots=True)
class HttpAnswer:
    """The server's answer to one request."""

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
        """The reason for a refusal, as a sentence."""
        return f"The server answered {self.status_code}: {self.error.get('message') or self.text[:200]}"


class Server:
    """A server, known by its address. Every request opens its own connection.

    `model`: of a fleet with several models, the one that all requests are about.
    """

    def __init__(self, url: str, *, key: str | None = None, model: str | None = None) -> None:
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
        self._query = urlencode({"model": model}) if model else ""
        self._connection_class = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._host, self._port = host, port

    def request(
        self, method: str, path: str, body: Json | None = None, *, timeout_s: float, accept: str = "application/json"
    ) -> HttpAnswer:
        """Send one request; `timeout_s` limits the whole answer. Raises `ServerError`."""
        with self.stream(method, path, body, timeout_s=timeout_s, accept=accept) as response:
            return HttpAnswer(response.status, response.read().decode("utf-8", "replace"))

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
        """A context with the open response, closed at its end; `timeout_s` limits each read."""
        connection = self._connection_class(self._host, self._port, timeout=CONNECT_TIMEOUT_S)
        try:
            self._connect(connection)
            connection.sock.settimeout(timeout_s)
            headers = {"Accept": accept, **self._headers}
            if body is not None:
                headers["Content-Type"] = "application/json"
            data = None if body is None else json.dumps(body).encode()
            connection.request(method, self._base + self._with_model(path), data, headers)
            yield connection.getresponse()
        except TimeoutError:
            raise ServerError(f"{self.url} did not answer within {timeout_s:g} s.") from None
        except (OSError, http.client.HTTPException) as error:
            raise ServerError(f"The connection to {self.url} broke: {error or type(error).__name__}") from None
        finally:
            connection.close()

    def _with_model(self, path: str) -> str:
        return path + ("&" if "?" in path else "?") + self._query if self._query else path

    def _connect(self, connection: http.client.HTTPConnection) -> None:
        try:
            connection.connect()
        except OSError as error:
            raise ServerError(
                f"No server answers at {self.url} ({error.strerror or error}). "
                "Start one with `headwater serve`, or give its address with --url or HEADWATER_URL."
            ) from None


class BackgroundCall:
    """A call in its own thread, so that the caller can show progress and be interrupted."""

    def __init__(self, call: Callable[[], HttpAnswer]) -> None:
        self._call = call
        self._answer: HttpAnswer | None = None
        self._error: ServerError | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def is_done(self, wait_s: float) -> bool:
        """Wait up to `wait_s` for the end of the call; whether it has ended."""
        self._thread.join(wait_s)
        return not self._thread.is_alive()

    def result(self) -> HttpAnswer:
        """Wait for the answer. Raises `ServerError`."""
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
