"""The requests of random runs: single ones, conversations, bursts and aborts."""

import random
from collections.abc import Iterator

from msgspec import structs

from headwater.messages.base import pack_ids
from headwater.messages.generation import (
    Abort,
    Generate,
    GenerateBatch,
    Grammar,
    LogprobParams,
    Pooling,
    RequestOptions,
    SamplingParams,
)
from headwater.simulation.fakes.grammar import BROKEN, FakeGrammar
from headwater.simulation.random_runs.callers import Callers
from headwater.simulation.random_runs.events import Deliver, Event, FollowUp
from headwater.simulation.random_runs.prompts import Prompts

ADAPTER_NAMES = ("lora-a", "lora-b", "lora-c")
POOLINGS: tuple[Pooling, ...] = ("last", "mean")


class Requests:
    """Each method is one action of clients, as events."""

    def __init__(
        self,
        source: random.Random,
        *,
        prompts: Prompts,
        callers: Callers,
        has_pooling: bool = False,
        grammars: float = 0.0,
        end_ids: tuple[int, ...] = (),
        has_adapters: bool = False,
    ) -> None:
        """`grammars`: the share of requests with one; `end_ids`: the end tokens of the engines."""
        self._has_adapters = has_adapters
        self._source = source
        self._has_pooling = has_pooling  # requests for embeddings among those that only compute their prompt
        self._grammars = grammars
        self._end_ids = frozenset(end_ids)
        self._prompts = prompts
        self._callers = callers

    def request(self) -> Iterator[Event]:
        yield Deliver(self.generate(self._prompts.prompt()), self._callers.client(), self._callers.engine())

    def follow_up(self) -> Iterator[Event]:
        if self._callers.rids:
            parent = self._source.choice(self._callers.rids)
            more = self._prompts.tokens(self._source.randrange(1, 6))
            yield FollowUp(self.generate(more), self._callers.client(), parent, self._callers.engine())

    def burst(self) -> Iterator[Event]:
        """Several requests with the same beginning, in separate messages or in one."""
        stem = self._prompts.stem()
        events: list[Deliver] = []
        items: list[Generate] = []
        for _ in range(self._source.randrange(3, 12)):
            tail = self._prompts.tokens(self._source.randrange(1, 4))
            items.append(self.generate(stem + tail))
            events.append(Deliver(items[-1], self._callers.client(), self._callers.engine()))
        if len(events) % 2:
            yield Deliver(GenerateBatch(items=tuple(items)), events[0].client, events[0].engine)
        else:
            yield from events

    def abort(self) -> Iterator[Event]:
        rid = self._source.choice(self._callers.rids) if self._callers.rids else "r0"
        match = self._source.choices(["exact", "prefix", "all"], [12, 1, 1])[0]
        if match == "prefix":  # which other names share
            rid = rid[:-1]
        yield self._callers.call(lambda call_id: Abort(call_id=call_id, rid=rid, match=match))  # type: ignore[arg-type]

    def generate(self, prompt: list[int], *, max_new_tokens: int | None = None) -> Generate:
        """A request with this prompt and random parameters; `max_new_tokens` of None is random as well."""
        source = self._source
        rid = self._callers.rid()
        logprobs = None
        if source.random() < 0.1:
            logprobs = LogprobParams(prompt_start=source.choice([-1, 0, len(prompt) // 2]))
        num_tokens = source.choice([0, 1, 3, 8, 8, 20, 40])
        num_tokens = num_tokens if max_new_tokens is None else max_new_tokens
        pools = self._has_pooling and num_tokens == 0
        grammar = None
        if self._grammars and source.random() < self._grammars:
            grammar = _with_limits(self._grammar(), len(prompt))
        return Generate(
            rid=rid,
            prompt_ids=pack_ids(prompt),
            sampling=SamplingParams(
                max_new_tokens=num_tokens,
                min_new_tokens=source.choice([0, 0, 0, 4]),
                ignore_eos=source.random() < 0.3,
                logit_bias=_liked(grammar) if grammar is not None else None,
            ),
            logprobs=logprobs,
            options=RequestOptions(
                cache_salt=source.choice(self._prompts.salts),
                extra_key=source.choice(self._prompts.keys),
                priority=source.choice([0, 0, 0, 1]),
                no_store=source.random() < 0.06,
                lora_name=source.choice(("", *ADAPTER_NAMES, *ADAPTER_NAMES)) if self._has_adapters else "",
            ),
            grammar=grammar,
            output_interval=(1, 1, 4, 1 << 30)[len(prompt) % 4],  # some clients do not stream
            account=len(prompt) % 3,
            pooling=POOLINGS[len(prompt) % 2] if pools else None,
        )

    def _grammar(self) -> Grammar:
        """One of a few grammars, some of which begin after free text; the request's bias makes its end likely."""
        source = self._source
        seed, num_tokens = source.randrange(8), source.choice([1, 4, 12, 60])
        fails_at = source.randrange(6) if source.random() < 0.05 else -1
        text = FakeGrammar(seed=seed, num_tokens=num_tokens, fails_at=fails_at).text
        if source.random() < 0.05:
            text = BROKEN
        marks = (700 + seed, 710 + seed)[: source.choice([0, 0, 0, 1, 2])]
        return Grammar(text=text, begins_after=() if self._end_ids.intersection(marks) else marks)


def _with_limits(grammar: Grammar, number: int) -> Grammar:
    """The grammar; by the number, its free text is optional or short, or the grammar is only a limit to free text."""
    if not grammar.begins_after:
        return grammar
    return structs.replace(
        grammar,
        text="" if number % 5 == 0 else grammar.text,
        opens_with=grammar.begins_after[0] + 20 if number % 3 == 0 else None,
        begins_within=(None, 0, 2, 5)[number % 4],
    )


def _liked(grammar: Grammar) -> dict[int, float]:
    """A bias towards the tokens around free text."""
    opening = () if grammar.opens_with is None else (grammar.opens_with,)
    return dict.fromkeys((*grammar.begins_after, *opening), 5.0)
