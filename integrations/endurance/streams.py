"""The load of a long run: streams that send one request after another, of every kind that clients send."""

import asyncio
import collections
import json
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

ANSWER_LIMIT_S = 120.0
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 12}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


@dataclass(slots=True)
class Outcome:
    """Answers by kind, and what went wrong; `left_out` are kinds that this server does not answer."""

    counts: collections.Counter[str] = field(default_factory=collections.Counter)
    failures: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


class Stream:
    """One client. Prefixes are shared between streams, so the cache hits, evicts and computes again."""

    def __init__(self, http: httpx.AsyncClient, *, model: str, seed: int, outcome: Outcome, pause_s: float) -> None:
        self._http = http
        self._model = model
        self._random = random.Random(seed)
        self._outcome = outcome
        self._pause_s = pause_s
        self._num_asked = 0
        self._name = f"stream-{seed}"

    async def run(self, until_s: float) -> None:
        kinds = {name: kind for name, kind in self.kinds().items() if name not in self._outcome.left_out}
        while time.monotonic() < until_s:
            name = self._random.choice(list(kinds))
            await self.ask(name, kinds[name])
            await asyncio.sleep(self._random.uniform(0, 2 * self._pause_s))

    async def probe(self) -> None:
        """Ask each kind once; a kind that fails before the run is left out of it, and listed."""
        for name, kind in self.kinds().items():
            num_failures = len(self._outcome.failures)
            await self.ask(name, kind)
            if len(self._outcome.failures) > num_failures:
                self._outcome.left_out[name] = self._outcome.failures.pop()

    async def ask(self, name: str, kind: Callable[[], Awaitable[None]]) -> None:
        self._num_asked += 1
        try:
            await asyncio.wait_for(kind(), ANSWER_LIMIT_S)
        except (httpx.HTTPError, TimeoutError, AssertionError, ValueError, KeyError, IndexError) as error:
            self._outcome.failures.append(f"{name}: {type(error).__name__}: {error}"[:300])
        self._outcome.counts[name] += 1

    def kinds(self) -> dict[str, Callable[[], Awaitable[None]]]:
        return {
            "generate": self._generate,
            "chat stream": self._chat_stream,
            "completions": self._completions,
            "json_schema": self._json_schema,
            "regex": self._regex,
            "tools required": self._tools_required,
            "responses": self._responses,
            "messages": self._messages,
            "ollama": self._ollama,
            "embeddings": self._embeddings,
            "score": self._logprobs,
            "aborted": self._aborted,
            "left": self._left,
            "wrong": self._wrong,
            "flush": self._flush,
        }

    async def _post(self, path: str, body: dict[str, Any], *, status: int = 200) -> Any:
        answer = await self._http.post(path, json=body)
        assert answer.status_code == status, f"{path}: {answer.status_code} {answer.text[:150]}"
        return answer.json() if answer.headers["content-type"].startswith("application/json") else answer.text

    async def _events(self, path: str, body: dict[str, Any]) -> list[str]:
        async with self._http.stream("POST", path, json=body) as answer:
            lines = [line async for line in answer.aiter_lines() if line]
        assert answer.status_code == 200, f"{path}: {answer.status_code} {''.join(lines)[:150]}"
        return lines

    def _question(self) -> str:
        n = self._random.randrange(100_000)
        return f"What is the number {n} good for? " + "Answer in full sentences. " * self._random.randint(0, 20)

    def _chat(self, **more: Any) -> dict[str, Any]:
        system = f"You are assistant number {self._random.randrange(7)}. " + "Answer with care. " * 12
        messages = [{"role": "system", "content": system}, {"role": "user", "content": self._question()}]
        return {"model": self._model, "messages": messages, "max_tokens": self._random.randint(1, 24)} | more

    def _native(self, **sampling: Any) -> dict[str, Any]:
        fields = {"temperature": self._random.choice((0.0, 0.8)), "max_new_tokens": self._random.randint(1, 16)}
        return {"text": self._question(), "sampling_params": fields | sampling}

    async def _generate(self) -> None:
        answer = await self._post("/generate", self._native())
        assert answer["meta_info"]["finish_reason"]["type"] in ("length", "stop"), answer

    async def _chat_stream(self) -> None:
        lines = await self._events("/v1/chat/completions", self._chat(stream=True))
        assert lines[-1] == "data: [DONE]", lines[-1]

    async def _completions(self) -> None:
        prompts = [self._question() for _ in range(self._random.randint(1, 3))]
        body = {"model": self._model, "prompt": prompts, "max_tokens": 8, "n": 2}
        assert len((await self._post("/v1/completions", body))["choices"]) == 2 * len(prompts)

    async def _json_schema(self) -> None:
        """A schema that no request has sent before, every other time: the compiled ones must not pile up."""
        low = self._random.choice((0, self._random.randrange(1_000_000)))
        schema = {"type": "object", "properties": {"n": {"type": "integer", "minimum": low, "maximum": low + 9}}}
        schema |= {"required": ["n"], "additionalProperties": False}
        form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}
        answer = await self._post("/v1/chat/completions", self._chat(response_format=form, max_tokens=120))
        choice = answer["choices"][0]
        assert choice["finish_reason"] == "stop", choice
        n = json.loads(choice["message"]["content"])["n"]
        assert low <= n <= low + 9, n

    async def _regex(self) -> None:
        answer = await self._post("/generate", self._native(regex="[0-9]{3}-[a-f]{2}", max_new_tokens=12))
        number, _, letters = answer["text"].partition("-")
        assert number.isdigit(), answer["text"]
        assert set(letters) <= set("abcdef"), answer["text"]

    async def _tools_required(self) -> None:
        body = self._chat(tools=[TOOL], tool_choice="required", stream=True, max_tokens=120)
        lines = [line.removeprefix("data: ") for line in await self._events("/v1/chat/completions", body)]
        choices = [choice for line in lines[:-1] for choice in json.loads(line)["choices"]]
        calls = [call for choice in choices for call in choice["delta"].get("tool_calls") or ()]
        arguments = "".join(call["function"].get("arguments") or "" for call in calls if call["index"] == 0)
        assert set(json.loads(arguments)) == {"city"}, arguments

    async def _responses(self) -> None:
        body = {"model": self._model, "input": self._question(), "max_output_tokens": 16}
        assert (await self._post("/v1/responses", body))["output"]

    async def _messages(self) -> None:
        lines = await self._events("/v1/messages", self._chat(stream=True) | {"messages": self._chat()["messages"][1:]})
        assert "event: message_stop" in lines, lines[-1]

    async def _ollama(self) -> None:
        body = {"model": self._model, "messages": self._chat()["messages"], "options": {"num_predict": 8}}
        assert json.loads((await self._events("/api/chat", body))[-1])["done"] is True

    async def _embeddings(self) -> None:
        body = {"model": self._model, "input": [self._question(), self._question()]}
        assert len((await self._post("/v1/embeddings", body))["data"]) == 2

    async def _logprobs(self) -> None:
        body = {"model": self._model, "prompt": self._question(), "max_tokens": 1, "echo": True, "logprobs": 2}
        logprobs = (await self._post("/v1/completions", body))["choices"][0]["logprobs"]
        assert logprobs["token_logprobs"][0] is None

    async def _aborted(self) -> None:
        rid = f"{self._name}-{self._num_asked}-"
        body = self._native(max_new_tokens=300, ignore_eos=True) | {"rid": rid}
        generating = asyncio.create_task(self._post("/generate", body))
        await asyncio.sleep(self._random.uniform(0.0, 0.5))
        await self._http.post("/abort_request", json={"rid": rid})
        await generating

    async def _left(self) -> None:
        async with self._http.stream("POST", "/v1/chat/completions", json=self._chat(stream=True, max_tokens=300)) as a:
            assert a.status_code == 200, a.status_code
            await anext(a.aiter_lines())

    async def _wrong(self) -> None:
        answer = await self._post("/generate", self._native(max_new_tokens=-1), status=400)
        assert "max_new_tokens" in answer["error"]["message"]

    async def _flush(self) -> None:
        """Rarely, since the cache is to be full most of the time."""
        if self._random.random() < 0.02:
            answer = await self._http.post("/flush_cache", params={"mode": "now"})
            assert answer.status_code in (200, 202), answer.text
