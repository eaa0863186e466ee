"""A model of one request, as seen by its client and by an ideal engine."""

import struct

import numpy as np

from headwater.messages.base import unpack_ids
from headwater.messages.generation import Generate, Output
from headwater.simulation.checks.grammar_model import GrammarModel
from headwater.simulation.checks.violation import Violation, demand
from headwater.simulation.fakes.canary import (
    START,
    expected_tokens,
    mix,
    namespace_text,
    next_canaries,
    origin,
    pooled_canaries,
    token_from,
    with_adapter,
)

RequestKey = tuple[bytes, str]  # client and rid
_MASK = (1 << 64) - 1


class RequestModel:
    """The tokens, canaries and end of one request.

    When a request enters a slot, its cached KV is that of the current weights; later KV is that of the weights current
    at its computation. `tokens` are the prompt and all sampled tokens, including those not yet sent to the client.
    """

    def __init__(
        self,
        key: RequestKey,
        message: Generate,
        *,
        room: int,
        stop_ids: frozenset[int],
        vocab_size: int,
        end_ids: frozenset[int] = frozenset(),
    ) -> None:
        """`stop_ids` end this answer; `end_ids` are the model's end tokens, which no grammar has in its midst."""
        self.key = key
        self.rid = message.rid
        self.message = message
        self.base_namespace = namespace_text(message.options.cache_salt, message.options.extra_key)
        self.namespace = self.base_namespace  # with its adapter, once it has begun
        self.adapter = ""  # the content that it began with
        self.prompt: list[int] = unpack_ids(message.prompt_ids).tolist()
        self.tokens = self.prompt.copy()
        self.num_told = 0
        self.num_kv = 0
        self.last_turn: int | None = None  # of its last step since it entered a slot
        self.number = 0  # in the order of arrival
        self.is_refused = False  # the engine has refused it, or will in this turn
        self.must_be_refused = False  # the queue was full when it arrived
        # requests read under its rid once it was refused, and whether each must be refused
        self.followers: list[tuple[Generate, bool]] = []
        self.is_delivered = False  # the engine has read it, at `arrived_s`
        self.arrived_s = 0.0
        self.timeouts_due: set[int] = set()  # statuses with which timeouts may end it in this turn
        self.num_cached = 0  # prompt tokens that it found in the cache when it first entered a slot
        self.num_entered = 0  # number of entries into a slot
        self.may_end_early = False  # an abort, pause or update asked for it
        self.has_failed = False  # its step has raised, or its logits were not finite
        self.num_weights_changes = 0  # weight updates since its start
        self.is_invalid = False  # its KV since it entered its slot is invalid
        self.is_too_long = len(self.prompt) > room - (message.sampling.max_new_tokens > 0)
        self._limit = min(message.sampling.max_new_tokens, room - len(self.prompt))
        self._stop_ids = stop_ids
        self._vocab_size = vocab_size
        self.is_grammar_refused = False  # its grammar is broken, or has been compiled for too long
        self.grammar: GrammarModel | None = None
        if message.grammar is not None and message.sampling.max_new_tokens > 0:
            self.grammar = GrammarModel(message, stop_ids=stop_ids, end_ids=end_ids, vocab_size=vocab_size)
        self.num_right_drafts = 0  # drafted tokens that were its next ones
        self._is_astray = False  # whether the draft being computed has left its text
        self.kv = b""  # canaries up to `num_kv`, uint64 each
        self._total = 0  # the sum that determines the next token
        self._num_known = len(self.prompt)  # tokens when it last entered a slot
        self._weights: list[str] = []  # by position, since then
        self._num_logprobs = 0
        self._num_prompt_logprobs = 0

    @property
    def has_started(self) -> bool:
        return self.num_entered > 0

    def use_adapter(self, content: str) -> None:
        """It begins, computed with this adapter; "" is none."""
        self.adapter = content
        self.namespace = with_adapter(self.base_namespace, content)

    def may_enter_with(self, known: list[int]) -> bool:
        """Whether these are the known tokens: all that were sent, and with an interval possibly more."""
        num_told = len(self.prompt) + self.num_told
        is_complete = len(known) == num_told or (self.message.output_interval > 1 and len(known) > num_told)
        return is_complete and known == self.tokens[: len(known)]

    # --- in slots -----------------------------------------------------------------------------------

    def enter(self, known: list[int], num_cached: int, *, weights: str) -> None:
        """Start again with `known` tokens, of which `num_cached` have KV of `weights`. Keeps `known`."""
        self._check_from_scratch()
        if not self.num_entered:
            self.num_cached = min(num_cached, len(self.prompt))
        self.num_entered += 1
        self.is_invalid = False
        self.tokens = known
        self._num_known = len(known)
        self._weights = []
        self.num_kv = self._total = 0
        self.last_turn = None
        cached = next_canaries(START, known[:num_cached], origin(weights, self.namespace))
        self.kv = b""
        self.extend(struct.pack(f"<{num_cached}Q", *cached), weights=weights)

    def extend(self, kv: bytes, *, weights: str) -> None:
        """Append the canaries of the next positions."""
        canaries = struct.unpack(f"<{len(kv) // 8}Q", kv)
        total, weight = self._total, 2 * self.num_kv + 1
        for canary in canaries:
            total += canary * weight
            weight += 2
        self._total = total
        self.kv += kv
        self._weights += [weights] * len(canaries)
        self.num_kv += len(canaries)

    def is_stray(self, first: int, tokens: list[int], *, is_draft: bool) -> bool:
        """Whether what is computed at `first` was drafted and is not its text. Nothing may read it afterwards."""
        self._is_astray = is_draft and (self._is_astray or tokens != self.tokens[first : first + 1])
        self.num_right_drafts += is_draft and not self._is_astray
        return self._is_astray

    def next_tokens(self, count: int, *, weights: str) -> list[int]:
        """The tokens that will follow, if these weights compute them."""
        before = int.from_bytes(self.kv[-8:], "little") if self.kv else START
        total, position, tokens = self._total, self.num_kv, self.tokens.copy()
        while len(tokens) < len(self.tokens) + count:
            (before,) = next_canaries(before, tokens[position : position + 1], origin(weights, self.namespace))
            total += before * (2 * position + 1)
            position += 1
            if position == len(tokens):
                tokens.append(token_from(total, self._vocab_size))
        return tokens[len(self.tokens) :]

    def sample(self) -> None:
        """Append the next token, which follows from all KV."""
        if self.num_kv != len(self.tokens):
            raise Violation("samples_from_all_kv", self.rid)
        if self.grammar is not None:
            self.tokens.append(self.grammar.next_token(self._total, self.tokens[len(self.prompt) :]))
            return
        self.tokens.append(mix(self._total & _MASK) % self._vocab_size)

    # --- the client's view --------------------------------------------------------------------------

    def received(self, output: Output) -> None:
        """The client has received `output`."""
        if output.token_ids:
            first = len(self.prompt) + self.num_told
            right = tuple(self.tokens[first : first + len(output.token_ids)])
            if output.token_ids != right:
                raise Violation("right_text", f"{self.rid} is told {output.token_ids}, not {right}")
            self.num_told += len(output.token_ids)
            if self.num_told > self._limit:
                raise Violation("right_end", f"{self.rid} got more tokens than it asked for")
        self._num_logprobs += len(output.logprobs or ())
        self._num_prompt_logprobs += len(output.prompt_logprobs or ())
        if output.finish is not None:
            self._check_end(output)
        elif self._end_due() is not None:
            raise Violation("right_end", f"{self.rid} goes on after its end")

    def _end_due(self) -> str | None:
        """The type of end that is due by now."""
        last = self.tokens[len(self.prompt) + self.num_told - 1]
        if self.num_told and last in self._stop_ids and self.num_told > self.message.sampling.min_new_tokens:
            return "stop"
        if self.num_told and self.grammar is not None and self.grammar.is_complete(self._told):
            return "stop"
        return "length" if self.num_told >= self._limit and self.num_told else None

    @property
    def _told(self) -> list[int]:
        """The generated tokens that the client has."""
        return self.tokens[len(self.prompt) : len(self.prompt) + self.num_told]

    def _is_bad_grammar(self) -> bool:
        """Whether the grammar is refused, or too complex for the next mask."""
        return self.is_grammar_refused or (self.grammar is not None and self.grammar.fails_after(self._told))

    def _check_end(self, output: Output) -> None:
        finish = output.finish
        assert finish is not None and output.meta is not None
        num_named, num_due = len(output.meta.weights_versions), self.num_weights_changes
        is_named = num_named == (num_due + 1 if num_due else 0)
        meta = output.meta
        num_counted = meta.cached_device + meta.cached_host + meta.cached_storage
        text = f"{self.rid} found {self.num_cached} tokens in the cache, told are {num_counted}"
        demand(num_counted == self.num_cached, "counts_are_right", text)
        is_possible = meta.num_accepted <= self.num_right_drafts and meta.num_accepted <= meta.num_drafted
        text = f"{self.rid}: {meta.num_accepted} of {meta.num_drafted} drafts counted, {self.num_right_drafts} right"
        demand(is_possible, "counts_are_right", text)
        demand(is_named, "labels_are_told", f"{self.rid} names {num_named} weights, {num_due} came while it ran")
        if finish.type == "abort":
            is_right = (
                (finish.status == 0 and self.may_end_early)
                or (finish.status == 400 and (self.is_too_long or self._is_bad_grammar()))
                or (finish.status == 500 and self.has_failed)
                or (finish.status == 429 and self.must_be_refused)
                or (finish.status == 404 and bool(self.message.options.lora_name) and not self.has_started)
                or finish.status in self.timeouts_due
            )
            demand(is_right, "right_end", f"{self.rid} was aborted ({finish.status} {finish.message}), asked by nobody")
            return
        due = self._end_due() or ("length" if self._limit <= 0 else None)
        demand(finish.type == due, "right_end", f"{self.rid} ended by {finish.type}, due was {due}")
        self._check_from_scratch()
        self._check_logprobs()
        self._check_embedding(output.embedding)

    def _check_embedding(self, embedding: bytes | None) -> None:
        """It is made of all tokens of the prompt or of the last one, whatever chunks and cache hits there were."""
        pooling = self.message.pooling
        if pooling is None:
            demand(embedding is None, "embedding_is_of_the_prompt", f"{self.rid} wants none")
            return
        right = pooled_canaries(self.kv[: 8 * len(self.prompt)] if pooling == "mean" else self.kv[-8:])
        right /= np.linalg.norm(right)
        is_right = embedding is not None and np.allclose(np.frombuffer(embedding, dtype=np.float32), right, atol=1e-5)
        demand(is_right, "embedding_is_of_the_prompt", f"{self.rid} ({pooling}) gets another")

    def _check_logprobs(self) -> None:
        wanted = self.message.logprobs
        if wanted is None:
            return
        demand(self._num_logprobs == self.num_told, "logprobs_complete", f"{self.rid}: {self._num_logprobs}")
        num_prompt = len(self.prompt) - wanted.prompt_start if wanted.prompt_start >= 0 else 0
        demand(
            self._num_prompt_logprobs == num_prompt,
            "logprobs_complete",
            f"{self.rid}: {self._num_prompt_logprobs} of {num_prompt} prompt tokens",
        )

    def _check_from_scratch(self) -> None:
        """Recompute the tokens sent since the last entry from tokens, weights by position and namespace."""
        told = self.tokens[self._num_known : len(self.prompt) + self.num_told]
        if not told:
            return
        known = self.tokens[: self._num_known]
        grammar, outputs = self.grammar, known[len(self.prompt) :]
        right = expected_tokens(
            known,
            len(told),
            self._vocab_size,
            self._weights,
            namespace=self.namespace,
            choose=None if grammar is None else lambda total, new: grammar.next_token(total, outputs + new),
        )
        demand(told == right, "right_text", f"{self.rid} was told {told}, not {right}")
