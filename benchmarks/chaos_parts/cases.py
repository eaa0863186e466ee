"""Requests of every kind, with one right answer for each of the weights."""

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import httpx

Json = dict[str, Any]
Kind = Literal["generate", "completion", "chat"]
PATHS = {"generate": "/generate", "completion": "/v1/completions", "chat": "/v1/chat/completions"}
MIN_MARGIN = 0.02  # in log-probability, between the two most likely tokens; below it, rounding may decide
NUM_AT_ONCE = 8
TOPICS = "rivers bread clocks bridges winter maps music paper salt trains bees glass".split()


@dataclass(frozen=True, slots=True)
class Case:
    """A request that is always the same, so that its answer is known."""

    kind: Kind
    prompt: str
    num_tokens: int

    def body(self, *, stream: bool, **more: Any) -> Json:
        if self.kind == "generate":
            sampling = {"temperature": 0, "max_new_tokens": self.num_tokens, "ignore_eos": True}
            return {"text": self.prompt, "sampling_params": sampling, "stream": stream, **more}
        shared = {"model": "default", "temperature": 0, "max_tokens": self.num_tokens, "ignore_eos": True}
        chat = {"messages": [{"role": "user", "content": self.prompt}]}
        asked: Json = chat if self.kind == "chat" else {"prompt": self.prompt}
        return shared | asked | {"stream": stream, **more}


@dataclass(slots=True)
class Answer:
    """The received answer, from any API."""

    text: str = ""
    ids: tuple[int, ...] | None = None  # if the API reports them
    finish: str | None = None
    label: str | None = None  # of the weights, if the API reports it
    spans: tuple[tuple[str, int], ...] = ()  # changes of the weights during the answer: label and first output token
    error: str | None = None  # the server's message
    status: int = 200

    def take(self, kind: Kind, piece: Json, *, is_chunk: bool) -> None:
        """Add a whole answer, or the next chunk of a stream."""
        if "error" in piece:
            self.error = str(piece["error"].get("message"))
            return
        if kind == "generate":
            facts = piece["meta_info"]
            self.text = piece["text"]  # a chunk of /generate has the whole text so far
            self.ids = tuple(piece["output_ids"])
            self.label = facts["weight_version"] or self.label
            self.spans = tuple((label, first) for label, first in facts.get("weights_versions", ()))
            if facts["finish_reason"]:
                self.finish = facts["finish_reason"]["type"]
            return
        self.label = (piece.get("metadata") or {}).get("weight_version") or self.label
        for choice in piece.get("choices", ()):
            part = choice.get("delta" if is_chunk else "message") if kind == "chat" else choice
            self.text += (part or {}).get("content" if kind == "chat" else "text") or ""
            self.finish = choice.get("finish_reason") or self.finish


def make_cases(seed: int, *, num_cases: int, max_tokens: int) -> list[Case]:
    """Requests of all kinds, with long and short prompts that share prefixes."""
    dice = random.Random(seed)
    openings = [f"You know all about {topic}. Answer with care and in whole sentences. " for topic in TOPICS[:4]]
    cases = []
    for number in range(num_cases):
        topic = dice.choice(TOPICS)
        long = " ".join(f"Remember item {dice.randrange(100)}." for _ in range(dice.choice((0, 0, 4, 12))))
        prompt = f"{dice.choice(openings)}{long} Question {number}: what of {topic}?"
        kind: Kind = ("generate", "completion", "chat")[number % 3]
        cases.append(Case(kind=kind, prompt=prompt, num_tokens=dice.randint(3, max_tokens)))
    return cases


async def learn(http: httpx.AsyncClient, cases: Sequence[Case]) -> dict[Case, Answer]:
    """The right answers, from a server without other load, of all cases whose every token wins clearly."""
    slots = asyncio.Semaphore(NUM_AT_ONCE)

    async def one(case: Case) -> Answer | None:
        async with slots:
            return await _ask_undisturbed(http, case)

    found = await asyncio.gather(*(one(case) for case in cases))
    return {case: answer for case, answer in zip(cases, found, strict=True) if answer is not None}


async def _ask_undisturbed(http: httpx.AsyncClient, case: Case) -> Answer | None:
    more: Json = {"completion": {"logprobs": 2}, "chat": {"logprobs": True, "top_logprobs": 2}}.get(case.kind) or {
        "return_logprob": True,
        "top_logprobs_num": 2,
    }
    response = await http.post(PATHS[case.kind], json=case.body(stream=False, **more))
    assert response.status_code == 200, response.text
    piece = response.json()
    answer = Answer()
    answer.take(case.kind, piece, is_chunk=False)
    assert answer.finish in ("length", "stop"), response.text
    return answer if min(_margins(case.kind, piece)) >= MIN_MARGIN else None


def _margins(kind: Kind, piece: Json) -> list[float]:
    """The margin between each token and the second most likely one, in log-probability."""
    if kind == "generate":
        tops = [[entry[0] for entry in top] for top in piece["meta_info"]["output_top_logprobs"]]
    elif kind == "chat":
        content = piece["choices"][0]["logprobs"]["content"]
        tops = [[entry["logprob"] for entry in token["top_logprobs"]] for token in content]
    else:
        tops = [list(top.values()) for top in piece["choices"][0]["logprobs"]["top_logprobs"]]
    # tokens with the same text share a name, so the margin is unknown and the case is left out
    return [sorted(top)[-1] - sorted(top)[-2] if len(top) > 1 else 0.0 for top in tops]
