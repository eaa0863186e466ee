"""Reads `/dashboard/events` in a thread of its own: a whole snapshot, then differences; connects again when it ends."""

import json
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from headwater.cli.control_client import refused
from headwater.cli.server_call import HttpAnswer, Server, ServerError
from headwater.http_api.dashboard.differences import patched

Json = dict[str, Any]
SILENT_S = 25.0  # the server sends a line at least every 10 s
AGAIN_S = 2.0


class Feed:
    """Calls `on_whole(snapshot, history)`, `on_patch(snapshot)` and `on_error(message)` from its thread."""

    def __init__(
        self,
        server: Server,
        *,
        on_whole: Callable[[Json, Json], None],
        on_patch: Callable[[Json], None],
        on_error: Callable[[str], None],
    ) -> None:
        self._server = server
        self._on_whole, self._on_patch, self._on_error = on_whole, on_patch, on_error
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dashboard-events", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """The thread ends with the next event; nothing is called afterwards."""
        self._ended.set()

    def _run(self) -> None:
        while not self._ended.is_set():
            message = self._follow()
            if not self._ended.is_set():
                self._on_error(message)
            self._ended.wait(AGAIN_S)

    def _follow(self) -> str:
        """One connection, until it ends. Returns why."""
        snapshot: Json = {}
        try:
            with self._server.stream(
                "GET", "/dashboard/events", timeout_s=SILENT_S, accept="text/event-stream"
            ) as response:
                if response.status != 200:
                    return str(refused(HttpAnswer(response.status, response.read().decode("utf-8", "replace"))))
                for name, payload in events(response):
                    if self._ended.is_set():
                        break
                    if name == "whole":
                        snapshot = payload["snapshot"]
                        self._on_whole(snapshot, payload.get("history", {}))
                    elif name == "patch":
                        snapshot = patched(snapshot, payload)
                        self._on_patch(snapshot)
        except ServerError as error:
            return str(error)
        except (ValueError, KeyError) as error:
            return f"{self._server.url} sends events that are not a Headwater server's: {error}"
        return "The server ended the stream."


def events(lines: Iterable[bytes]) -> Iterator[tuple[str, Json]]:
    """Name and content of each server-sent event. Comments are left out."""
    name, data = "", b""
    for line in lines:
        text = line.rstrip(b"\r\n")
        if text.startswith(b"event:"):
            name = text[6:].strip().decode()
        elif text.startswith(b"data:"):
            data += text[5:].strip()
        elif not text and data:
            yield name, json.loads(data)
            name, data = "", b""
