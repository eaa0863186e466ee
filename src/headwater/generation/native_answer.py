"""Answers of /generate. As with SGLang, each event of a stream repeats everything so far."""

from collections.abc import Sequence
from typing import Any

from headwater.generation.answer_fields import Json, cached_tokens, cached_tokens_details, json_bytes
from headwater.generation.text_generation import TextChunk, TextGeneration
from headwater.messages.generation import Finish, OutputMeta, TokenLogprob
from headwater.tokenization.tokenizer import Tokenizer


def _speculation(meta: OutputMeta) -> Json:
    """How many drafted tokens were right, in SGLang's names. The length counts the token that each step adds itself."""
    return {
        "spec_verify_ct": meta.num_draft_steps,
        "spec_draft_token_num": meta.num_drafted,
        "spec_accept_token_num": meta.num_accepted,
        "spec_accept_rate": meta.num_accepted / meta.num_drafted,
        "spec_accept_length": 1 + meta.num_accepted / meta.num_draft_steps,
    }


def finish_reason(finish: Finish, num_tokens: int) -> Json:
    """SGLang's object for why an answer ended."""
    if finish.type == "length":
        return {"type": "length", "length": num_tokens}
    if finish.type == "stop":
        return {"type": "stop", "matched": finish.matched}
    return {"type": "abort", "message": finish.message, "status_code": finish.status or None,
            "err_type": finish.err_type or None}  # fmt: skip


class LogprobFormat:
    """Log-probabilities as `[logprob, token id, text or null]`."""

    def __init__(self, tokenizer: Tokenizer, *, with_text: bool, asked_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._with_text = with_text
        self._asked_ids = tuple(asked_ids)

    def of_token(self, item: TokenLogprob) -> list[Any]:
        return self._entry(item.logprob, item.token_id)

    def of_top(self, item: TokenLogprob) -> list[list[Any]] | None:
        """The most likely tokens of a position; None for the first prompt token, which nothing predicts."""
        if item.logprob is None:
            return None
        return [self._entry(lp, token) for lp, token in zip(item.top_logprobs, item.top_ids, strict=True)]

    def of_asked(self, item: TokenLogprob) -> list[list[Any]] | None:
        """The tokens of `token_ids_logprob`."""
        if item.logprob is None:
            return None
        return [self._entry(lp, token) for lp, token in zip(item.ids_logprobs, self._asked_ids, strict=True)]

    def _entry(self, logprob: float | None, token_id: int) -> list[Any]:
        return [logprob, token_id, self._tokenizer.token_text(token_id) if self._with_text else None]


class GrowingList:
    """A JSON list that only grows, kept encoded: an event copies it instead of encoding all items."""

    __slots__ = ("encoded",)

    def __init__(self) -> None:
        self.encoded = bytearray()  # the items with commas between them, without brackets

    def extend(self, items: Sequence[Any]) -> None:
        if items:
            if self.encoded:
                self.encoded += b","
            self.encoded += json_bytes(items)[1:-1]


class NativeAnswer:
    """Builds the answer for one generation, whole or as it grows."""

    def __init__(
        self,
        generation: TextGeneration,
        logprobs: LogprobFormat | None,
        *,
        with_prompt_ids: bool = False,
    ) -> None:
        self.generation = generation
        self._logprobs = logprobs
        self._with_prompt_ids = with_prompt_ids
        self._input_logprobs: bytes | None = None
        self._text = bytearray()
        self._unchanging: tuple[OutputMeta | None, bytes] | None = None
        self._output_ids = GrowingList()
        self._grown = {name: GrowingList() for name in self._logprob_columns(())}

    def whole(self) -> Json:
        """The answer so far as a dict."""
        generation = self.generation
        meta = self._facts() | self._input_facts() | self._logprob_columns(generation.logprobs)
        return {"text": generation.text, "output_ids": list(generation.token_ids), "meta_info": meta}

    def event(self, chunk: TextChunk, *, index: int | None = None) -> bytes:
        """One server-sent event: the answer so far, after `chunk` was added to it."""
        self._text += json_bytes(chunk.text)[1:-1]
        self._output_ids.extend(chunk.token_ids)
        parts = [b'data: {"text":"', self._text, b'","output_ids":[', self._output_ids.encoded]
        parts += [b'],"meta_info":{', self._encoded_facts(), self._encoded_logprobs(chunk), b"}"]
        parts.append(b"}\n\n" if index is None else b',"index":%d}\n\n' % index)
        return b"".join(parts)

    def _encoded_logprobs(self, chunk: TextChunk) -> bytes:
        if self._logprobs is None:
            return b""
        if self._input_logprobs is None:  # known with the first chunk, then fixed
            facts = json_bytes(self._input_facts())[1:-1]
            self._input_logprobs = b"," + facts if facts else b""
        parts = [self._input_logprobs]
        for name, items in self._logprob_columns(chunk.logprobs).items():
            self._grown[name].extend(items)
            parts.append(b',"%b":[%b]' % (name.encode(), self._grown[name].encoded))
        return b"".join(parts)

    def _encoded_facts(self) -> bytes:
        """Members of `meta_info`. While the answer grows, only the number of its tokens is encoded again."""
        generation = self.generation
        if generation.finish is not None:
            return json_bytes(self._facts())[1:-1]
        if self._unchanging is None or self._unchanging[0] is not generation.meta:
            facts = self._facts()
            del facts["completion_tokens"]
            self._unchanging = generation.meta, json_bytes(facts)[1:-1]
        return b'%b,"completion_tokens":%d' % (self._unchanging[1], len(generation.token_ids))

    def _facts(self) -> Json:
        generation, meta = self.generation, self.generation.meta
        finish, num_tokens = generation.finish, len(generation.token_ids)
        facts: Json = {
            "id": generation.request.rid,
            "finish_reason": None if finish is None else finish_reason(finish, num_tokens),
            "prompt_tokens": generation.num_prompt_tokens,
            "completion_tokens": num_tokens,
            "reasoning_tokens": 0,
            "cached_tokens": cached_tokens(meta),
            "cached_tokens_details": cached_tokens_details(meta),
            "weight_version": "" if meta is None else meta.weight_version,
            "num_retractions": 0 if meta is None else meta.num_retractions,
            "cache_generation": 0 if meta is None else meta.cache_generation,
            "dp_rank": generation.engine,
        }
        if finish is not None:
            facts["e2e_latency"] = generation.elapsed_s
            if meta is not None:
                facts["queue_time"] = meta.queue_time_s
                if meta.weights_versions:
                    facts["weights_versions"] = [list(span) for span in meta.weights_versions]
                if meta.num_draft_steps:
                    facts |= _speculation(meta)
        return facts

    def _input_facts(self) -> Json:
        facts: Json = {}
        if self._with_prompt_ids:
            facts["prompt_token_ids"] = self.generation.request.prompt_ids.tolist()
        asked = self.generation.request.logprobs
        if self._logprobs is None or asked is None:
            return facts
        items = self.generation.prompt_logprobs
        facts["input_token_logprobs"] = [self._logprobs.of_token(item) for item in items]
        if asked.top:
            facts["input_top_logprobs"] = [self._logprobs.of_top(item) for item in items]
        if asked.token_ids:
            facts["input_token_ids_logprobs"] = [self._logprobs.of_asked(item) for item in items]
        return facts

    def _logprob_columns(self, items: Sequence[TokenLogprob]) -> dict[str, list[Any]]:
        asked = self.generation.request.logprobs
        if self._logprobs is None or asked is None:
            return {}
        columns: dict[str, list[Any]] = {"output_token_logprobs": [self._logprobs.of_token(i) for i in items]}
        if asked.top:
            columns["output_top_logprobs"] = [self._logprobs.of_top(i) for i in items]
        if asked.token_ids:
            columns["output_token_ids_logprobs"] = [self._logprobs.of_asked(i) for i in items]
        return columns
