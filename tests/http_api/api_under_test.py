"""The app with a small tokenizer in front of a scripted engine; one ASCII character is one token."""

import asyncio
import contextlib
import json
import socket
import ssl
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import msgspec
from fastapi import FastAPI
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from headwater.client.engine_client import EngineClient
from headwater.generation.model_facts import ModelFacts
from headwater.http_api.app import create_app
from headwater.http_api.connection import ConnectionLimits
from headwater.http_api.http_server import HttpServer
from headwater.http_api.state import ApiState
from headwater.messages.generation import Generate
from headwater.tokenization.tokenizer import Tokenizer
from headwater.tokenization.tokenizer_parts import TokenizerParts
from scripted_engine import READY

EOS = "<|end|>"
SPECIAL_TOKENS = [EOS, "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|user|>{{ m['content'] }}{% endfor %}"
    "{% if tools %}{{ tools[0]['function']['name'] }}{% endif %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MODEL = "tiny/test-model"
# for httpx, which would read all certificates of the system for every client of an http:// address: 26 ms
PLAIN: dict[str, Any] = {"trust_env": False, "verify": ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)}


def byte_tokenizer(chat_template: str = CHAT_TEMPLATE, *, words: Sequence[str] = ()) -> Tokenizer:
    """Every byte is a token: ids 0 to 255; three special ones follow, then `words`, which are text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {char: index for index, char in enumerate(alphabet)}
    backend = Backend(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL_TOKENS)
    backend.add_tokens(list(words))
    return Tokenizer(
        TokenizerParts(
            backend=backend,
            special_tokens={"eos_token": EOS},
            eos_token_ids=(backend.token_to_id(EOS),),
            chat_templates={"default": chat_template},
        )
    )


TOKENIZER = byte_tokenizer()
EOS_ID = TOKENIZER.eos_token_ids[0]
ENGINE_READY = msgspec.structs.replace(READY, vocab_size=TOKENIZER.vocab_size, eos_token_ids=(EOS_ID,))


def calling(name: str, arguments: dict[str, Any]):
    """A script whose answer is a word and the call of a tool, in the form that a template of no known form gets."""
    return saying(f"Well:\n<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>")


async def until(condition: Callable[[], Any], timeout_s: float = 20.0) -> None:
    """Wait until something is so. Raises TimeoutError."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.002)


def saying(text: str):
    """A script whose answer to anything is `text`, then the end of text."""
    ids = [*TOKENIZER.encode(text), EOS_ID]

    def reply(_: Generate) -> Iterator[int]:
        yield from ids
        while True:
            yield EOS_ID

    return reply


@dataclass
class Api:
    """What a test holds: a client without network, the state and the (first) engine behind it."""

    http: httpx.AsyncClient
    state: ApiState
    engine: Any
    app: FastAPI

    async def post(self, path: str, body: Any = None, **more: Any) -> httpx.Response:
        return await self.http.post(path, json=body, **more)


@asynccontextmanager
async def api(
    *engines: Any, is_ready: bool = True, tokenizer: Tokenizer | None = None, **settings: Any
) -> AsyncIterator[Api]:
    """An app on `engines`, through httpx without a network. `settings` are fields of ApiState."""
    client = EngineClient([engine.endpoint for engine in engines])
    state = ApiState(client=client, **({"server_args": {}} | settings))
    await state.client.start()
    try:
        ready = await state.client.wait_ready(timeout_s=20)
        if is_ready:
            state.set_ready(tokenizer=tokenizer or TOKENIZER, model=facts(ready[0]))
        app = create_app(state)
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            yield Api(http=http, state=state, engine=engines[0], app=app)
    finally:
        await state.client.close()


def facts(ready: Any) -> ModelFacts:
    return ModelFacts.from_ready(
        ready, served_name=MODEL, model_path="/models/tiny", tokenizer_path="/models/tiny", model_type="tiny"
    )


_loops: dict[int, asyncio.AbstractEventLoop] = {}  # by the state's id


def call_in_loop_of(state: ApiState, function: Callable[..., object], *arguments: object) -> None:
    """From a test's thread, in the loop of a served app."""
    _loops[id(state)].call_soon_threadsafe(function, *arguments)


@contextlib.contextmanager
def served(
    *engines: Any, connections: ConnectionLimits = ConnectionLimits(), **settings: Any
) -> Iterator[tuple[str, ApiState]]:
    """The app in a real server on a free port of 127.0.0.1; its URL and state."""
    endpoints = [engine.endpoint for engine in engines]
    state = ApiState(client=EngineClient(endpoints), **({"server_args": {}} | settings))
    listener = socket.create_server(("127.0.0.1", 0))
    server = HttpServer(create_app(state), connections, log_level="warning", timeout_graceful_shutdown=2)

    async def run() -> None:
        _loops[id(state)] = asyncio.get_running_loop()
        serving = asyncio.ensure_future(server.serve(sockets=[listener]))
        await state.client.start()
        ready, *_ = await state.client.wait_ready(timeout_s=20)
        state.set_ready(tokenizer=TOKENIZER, model=facts(ready))
        await serving

    thread = threading.Thread(target=asyncio.run, args=(run(),), daemon=True)
    thread.start()
    try:
        while not (server.started and state.is_serving):
            time.sleep(0.005)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", state
    finally:
        server.should_exit = True
        thread.join(timeout=10)
        listener.close()


def events(response: httpx.Response) -> list[Any]:
    """The payloads of a stream; checks that it is one and that it was ended properly."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    *payloads, last = [line[len("data: ") :] for line in response.text.splitlines() if line]
    assert last == "[DONE]"
    return [json.loads(payload) for payload in payloads]


def named_events(response: httpx.Response) -> list[dict[str, Any]]:
    """The payloads of a stream whose events are named; checks that each is named as its payload says."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    return parsed_events(response.text)


def parsed_events(stream: str) -> list[dict[str, Any]]:
    """The payloads of named events."""
    *found, rest = stream.split("\n\n")
    assert rest == ""
    payloads = []
    for event in found:
        name, data = event.split("\n")
        payload = json.loads(data.removeprefix("data: "))
        assert name == f"event: {payload['type']}"
        payloads.append(payload)
    return payloads


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error of a response; checks that it has the one shape."""
    body = response.json()
    assert set(body) == {"error"}, body
    assert {"message", "type", "param", "code"} <= set(body["error"]), body
    assert "Traceback" not in response.text
    return body["error"]
