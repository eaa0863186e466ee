"""Clients that send one request after another and know the right answers."""

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

import httpx

from chaos_parts.cases import PATHS, Answer, Case
from chaos_parts.outcome import Outcome
from chaos_parts.weights_log import WeightsLog, checkpoint_of

ANSWER_LIMIT_S = 240.0  # far longer than any pause, release or restart of a run
REFUSALS = (429, 503)  # the queue is full, or an engine is gone: the client retries
ABORTED = 499
Expected = Mapping[str, Mapping[Case, Answer]]  # by checkpoint


async def _lines(response: httpx.Response) -> AsyncIterator[bytes]:
    """Lines split at newlines only: httpx also splits at Unicode separators, which answers may contain."""
    rest = b""
    async for part in response.aiter_bytes():
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            yield line


class Client:
    """A client that sends requests until the time is over. It streams some answers, and leaves some of the streams."""

    def __init__(
        self,
        http: httpx.AsyncClient,
        *,
        number: int,
        seed: int,
        expected: Expected,
        weights: WeightsLog,
        outcome: Outcome,
    ) -> None:
        self._http = http
        self._dice = random.Random(seed * 1000 + number)
        self._name = f"chaos-{number}"
        self._num_asked = 0
        self._expected = expected
        self._weights = weights
        self._outcome = outcome
        labels = list(expected)
        self._cases = [case for case in expected[labels[0]] if all(case in expected[label] for label in labels)]

    async def run(self, until_s: float) -> None:
        while time.monotonic() < until_s:
            case = self._dice.choice(self._cases)
            way = self._dice.choices(("whole", "stream", "leave"), weights=(4, 4, 1))[0]
            started_s = time.monotonic()
            self._num_asked += 1
            try:
                answer = await asyncio.wait_for(self._ask(case, way), ANSWER_LIMIT_S)
            except TimeoutError:
                self._outcome.fail("hang", f"{case.kind} {way}: no answer within {ANSWER_LIMIT_S:g} s")
                continue
            except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
                self._outcome.fail("broken answer", f"{case.kind} {way}: {type(error).__name__}: {error}")
                continue
            if answer is None:
                self._outcome.requests["left"] += 1
            else:
                self._judge(case, answer, way=way, started_s=started_s)
                if answer.status in REFUSALS:
                    await asyncio.sleep(0.2)

    async def _ask(self, case: Case, way: str) -> Answer | None:
        more: dict[str, Any] = {}
        if self._dice.random() < 0.3:
            more["cache_salt"] = self._dice.choice(("red", "blue"))
        if self._dice.random() < 0.1:
            more["no_store"] = True
        if case.kind == "generate":
            more["rid"] = f"{self._name}-{self._num_asked}-"
        body = case.body(stream=way != "whole", **more)
        if way != "whole":
            return await self._stream(case, body, num_lines=self._dice.randint(1, 6) if way == "leave" else None)
        response = await self._http.post(PATHS[case.kind], json=body)
        answer = Answer(status=response.status_code)
        answer.take(case.kind, response.json(), is_chunk=False)
        return answer

    async def _stream(self, case: Case, body: dict[str, Any], *, num_lines: int | None) -> Answer | None:
        """A whole stream; None after leaving it after `num_lines` events. ValueError if the stream is incomplete."""
        answer, has_ended = Answer(), False
        async with self._http.stream("POST", PATHS[case.kind], json=body) as response:
            answer.status = response.status_code
            if response.status_code != 200:
                answer.take(case.kind, json.loads(await response.aread()), is_chunk=False)
                return answer
            async for line in _lines(response):
                if not line.startswith(b"data:"):
                    continue
                if num_lines is not None:
                    if num_lines == 0:
                        return None
                    num_lines -= 1
                data = line[5:].strip()
                has_ended = has_ended or data == b"[DONE]"
                if data != b"[DONE]":
                    answer.take(case.kind, json.loads(data), is_chunk=True)
        if not has_ended and answer.error is None:
            raise ValueError("the stream ended without [DONE] and without an error")
        return answer

    def _judge(self, case: Case, answer: Answer, *, way: str, started_s: float) -> None:
        """Count an answer, or record its fault."""
        where = f"{case.kind} {way} {case.prompt[-40:]!r}"
        possible = self._weights.possible(started_s, time.monotonic())
        if answer.error is not None:
            if answer.status in (200, ABORTED, *REFUSALS):  # 200: a stream that ends with an error event
                self._outcome.requests[f"told an error ({answer.status})"] += 1
            else:
                self._outcome.fail("wrong status", f"{where}: {answer.status} {answer.error}")
        elif answer.finish is None:
            self._outcome.fail("no finish reason", where)
        if answer.label is not None and answer.label not in possible:
            self._outcome.fail("stale policy", f"{where}: by {answer.label!r}, the trainer was told {sorted(possible)}")
        elif answer.text and self._has_seen_several(case, answer, possible):
            self._outcome.requests["under changing weights"] += 1
        elif answer.text:
            self._compare(case, answer, where=f"{where} {sorted(possible)}", label=answer.label or min(possible))
        elif answer.finish is not None:
            self._outcome.requests["aborted before the first token"] += 1

    def _has_seen_several(self, case: Case, answer: Answer, possible: frozenset[str]) -> bool:
        """Whether weights may have changed between tokens, by the last chunk of /generate or by the clock."""
        tells = case.kind == "generate" and answer.finish is not None
        labels = {label for label, _ in answer.spans} if tells else possible
        return len({checkpoint_of(label) for label in labels}) > 1

    def _compare(self, case: Case, answer: Answer, *, where: str, label: str) -> None:
        right = self._expected[checkpoint_of(label)][case]
        if answer.finish in ("length", "stop") and answer.error is None:
            is_right = answer.text == right.text and answer.ids in (None, right.ids)
            self._outcome.requests["complete"] += 1
        else:
            is_right = right.text.startswith(answer.text.rstrip("\ufffd"))
            self._outcome.requests["aborted, partial text"] += 1
        if not is_right:
            others = [other for other in self._expected if self._expected[other][case].text == answer.text]
            hint = f" (that of {others[0]!r})" if others else ""
            self._outcome.fail("wrong text", f"{where} under {label!r}: {answer.text!r}{hint}, not {right.text!r}")
