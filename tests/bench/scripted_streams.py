"""A server that streams by script: OpenAI's and SGLang's events, with flushes and troubles, in a thread."""

import asyncio
import contextlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

CUTS = (1, 7, 50)  # bytes of the first pieces of a stream, so that events arrive cut


@dataclass
class StreamScript:
    """How the server behaves. `received` holds (path, body) of every request."""

    url: str = ""
    token_s: float = 0.0
    first_s: float = 0.0
    tokens_per_event: int = 1
    num_cached: int = 0
    flush_status: int = 200
    flush_answer: Any = None  # None: what Headwater would answer
    has_tiers: bool = True
    refuses: int | None = None  # a status for every request
    breaks_after: int | None = None  # tokens, then the connection ends
    error_after: int | None = None  # tokens, then an event with an error
    closes: bool = False  # no connection is kept
    received: list[tuple[str, Any]] = field(default_factory=list)
    num_connections: int = 0
    most_at_once: int = 0
    num_running: int = 0

    def bodies(self, path: str) -> list[Any]:
        return [body for sent, body in self.received if sent == path]


def events_of(path: str, body: Any, script: StreamScript) -> Iterator[bytes]:
    """One event for each group of tokens, and the last ones."""
    count = body["sampling_params"]["max_new_tokens"] if path == "/generate" else body["max_tokens"]
    num_prompt = len(
        json.dumps(body.get("messages") or body.get("prompt") or body.get("text") or body["input_ids"]).split()
    )
    step = script.tokens_per_event
    for sent in range(step, count + step, step):
        now = min(sent, count)
        if path == "/generate":
            finish = {"type": "length"} if now == count else None
            meta = {"prompt_tokens": num_prompt, "completion_tokens": now, "cached_tokens": script.num_cached}
            yield _event({"text": " a" * now, "output_ids": [7] * now, "meta_info": meta | {"finish_reason": finish}})
        else:
            text = " a" * (now - sent + step)
            choice = {"delta": {"content": text}} if "messages" in body else {"text": text}
            yield _event({"choices": [{"index": 0, "finish_reason": None} | choice], "usage": None})
    if path != "/generate":
        yield _event({"choices": [{"index": 0, "delta": {}, "text": "", "finish_reason": "length"}]})
        details = {"prompt_tokens_details": {"cached_tokens": script.num_cached}}
        yield _event({"choices": [], "usage": {"prompt_tokens": num_prompt, "completion_tokens": count} | details})
    yield b"data: [DONE]\n\n"


def _event(content: Any) -> bytes:
    return f"data: {json.dumps(content)}\n\n".encode()


class _Handler:
    def __init__(self, script: StreamScript) -> None:
        self._script = script

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._script.num_connections += 1
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                while await self._one(reader, writer):
                    pass
        finally:
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        _, path, _ = head[0].split()
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:])}
        text = await reader.readexactly(int(headers.get("content-length", 0)))
        body = json.loads(text) if text else None
        script = self._script
        script.received.append((path, body))
        if path in ("/v1/chat/completions", "/v1/completions", "/generate") and script.refuses is None:
            script.num_running += 1
            script.most_at_once = max(script.most_at_once, script.num_running)
            try:
                return await self._stream(path, body, writer)
            finally:
                script.num_running -= 1
        status, answer = self._answer(path)
        data = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
        writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
        await writer.drain()
        return not script.closes

    def _answer(self, path: str) -> tuple[int, Any]:
        script = self._script
        if path == "/v1/models":
            return 200, {"data": [{"id": "scripted"}]}
        if path == "/cache" and script.has_tiers:
            return 200, {"tiers": {"device": {}, "host": {}}, "storage": {"kind": "file"}}
        if path == "/flush_cache":
            ours = {"success": True, "message": "", "waited_s": 0.01, "still_warm": [], "pending": [], "freed": {}}
            return script.flush_status, ours if script.flush_answer is None else script.flush_answer
        if script.refuses is not None:
            return script.refuses, {"error": {"message": "not today"}}
        return 404, {"error": {"message": "there is no such route"}}

    async def _stream(self, path: str, body: Any, writer: asyncio.StreamWriter) -> bool:
        script = self._script
        closes = "Connection: close\r\n" if script.closes else "Transfer-Encoding: chunked\r\n"
        writer.write(f"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n{closes}\r\n".encode())
        await asyncio.sleep(script.first_s)
        cuts = list(CUTS)
        for number, event in enumerate(events_of(path, body, script)):
            if number == script.breaks_after:
                return False
            if number == script.error_after:
                event = _event({"error": {"message": "the engine ended"}})
            if number and script.token_s:
                await asyncio.sleep(script.token_s)
            while event:
                cut = cuts.pop(0) if cuts else len(event)
                piece, event = event[:cut], event[cut:]
                writer.write(piece if script.closes else f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
            await writer.drain()
            if number == script.error_after:
                break
        if not script.closes:
            writer.write(b"0\r\n\r\n")
        await writer.drain()
        return not script.closes


@contextlib.contextmanager
def scripted_streams(**settings: Any) -> Iterator[StreamScript]:
    """The script of a server on a free port of 127.0.0.1."""
    script = StreamScript(**settings)
    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(_Handler(script).serve, "127.0.0.1", 0, limit=1 << 24))
    script.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    thread = threading.Thread(target=loop.run_forever, name="scripted-streams")
    thread.start()
    try:
        yield script
    finally:
        asyncio.run_coroutine_threadsafe(_end(server), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _end(server: asyncio.Server) -> None:
    server.close()
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await asyncio.sleep(0.01)  # closed connections end in the next turn of the loop
