"""What an HTTP request was and did: collected while it runs, for its line in the log and for its trace."""

import re
import time
from collections.abc import Sequence
from typing import Any

from starlette.types import Scope

from headwater.generation.text_generation import GenerationObserver, Stages, TextGeneration
from headwater.tokenization.tokenizer import Tokenizer

RECORD = "headwater.record"  # key of the scope
_TRACEPARENT = re.compile(rb"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")
MAX_LOGGED_CHARS = 4096  # of each prompt and answer


class RequestRecord:
    """One HTTP request, made when it arrives. `generations` are those that have ended, in the order of their ends."""

    def __init__(self, request_id: str, scope: Scope) -> None:
        self.request_id = request_id
        self.scope = scope
        self.began_s = time.perf_counter()
        self.status = 500  # until an answer begins: a request that raises gets this one
        self.trace_id = _trace_id(scope)  # of the client, until a tracer sets the one it uses
        self.model_name = ""
        self.tokenizer: Tokenizer | None = None
        self.generations: list[TextGeneration] = []

    @property
    def duration_s(self) -> float:
        """Since it arrived."""
        return time.perf_counter() - self.began_s


class RecordingObserver:
    """The metrics' observer of one HTTP request, which keeps the generations as well. Costs nothing for a token."""

    def __init__(self, inner: GenerationObserver, record: RequestRecord) -> None:
        self.first_token = inner.first_token
        self.next_tokens = inner.next_tokens
        self._inner = inner
        self._record = record

    def ended(self, generation: TextGeneration) -> None:
        self._inner.ended(generation)
        self._record.generations.append(generation)


def _trace_id(scope: Scope) -> str | None:
    """The trace that the request belongs to, by its W3C header."""
    for name, value in scope["headers"]:
        if name == b"traceparent" and (found := _TRACEPARENT.fullmatch(value)):
            return found[1].decode()
    return None


def record_of(scope: Scope) -> RequestRecord | None:
    return scope.get(RECORD)


def finish_of(generation: TextGeneration) -> str:
    """Why it ended: `stop`, `length`, `abort`; `left` if its client closed the connection or the engine is gone."""
    return "left" if generation.finish is None else generation.finish.type


def slowest(stages: Sequence[Stages]) -> Stages:
    """Each stage of the generation that took longest in it."""
    return Stages(*(max(column) for column in zip(*stages, strict=True)))


def generation_fields(record: RequestRecord, *, shows_text: bool = False) -> dict[str, Any]:
    """What the generations of a request did, summed; times are those of the slowest one. Empty without generations."""
    generations = record.generations
    if not generations:
        return {}
    metas = [generation.meta for generation in generations if generation.meta is not None]
    firsts = [each.first_s - each.started_s for each in generations if each.first_s is not None]
    stages = slowest([generation.stages() for generation in generations])
    fields: dict[str, Any] = {
        "model": record.model_name,
        "rid": generations[0].request.rid,
        "engine": generations[0].engine,
        "num_generations": len(generations),
        "prompt_tokens": sum(generation.num_prompt_tokens for generation in generations),
        "cached_device": sum(meta.cached_device for meta in metas),
        "cached_host": sum(meta.cached_host for meta in metas),
        "cached_storage": sum(meta.cached_storage for meta in metas),
        "output_tokens": sum(len(generation.token_ids) for generation in generations),
        "finish": ",".join(dict.fromkeys(finish_of(generation) for generation in generations)),
        "num_retractions": sum(meta.num_retractions for meta in metas),
        "ttft_s": max(firsts, default=None),
        **stages._asdict(),
    }
    if shows_text and record.tokenizer is not None:
        decode = record.tokenizer.decode
        fields["prompts"] = [decode(each.request.prompt_ids)[:MAX_LOGGED_CHARS] for each in generations]
        fields["answers"] = [each.text[:MAX_LOGGED_CHARS] for each in generations]
    return fields
