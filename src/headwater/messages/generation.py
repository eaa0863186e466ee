"""Requests for text, and what the engine sends back while they run."""

from typing import Literal

from headwater.messages.base import Call, Struct

Pooling = Literal["last", "mean"]


class SamplingParams(Struct):
    """How tokens are chosen and when generation ends, as the engine needs it; ranges are checked by the API.

    Stop *strings* are not here: the engine knows no text. The client ends such a request with `Abort`.
    """

    max_new_tokens: int = 128  # 0: compute the prompt's KV only
    min_new_tokens: int = 0  # EOS and stop tokens are masked until then
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = -1  # -1: all
    min_p: float = 0.0
    frequency_penalty: float = 0.0  # over generated tokens, times their count
    presence_penalty: float = 0.0  # over generated tokens, once
    repetition_penalty: float = 1.0  # over prompt and generated tokens
    logit_bias: dict[int, float] | None = None
    seed: int = 0  # 0 <= seed < 2**63, always set by the client (random when the user gave none)
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False


class LogprobParams(Struct):
    """Which log-probabilities (natural log, of the raw logits' softmax) a request wants."""

    top: int = 0  # alternatives per position
    token_ids: tuple[int, ...] = ()  # further ids to report at every position
    prompt_start: int = -1  # first prompt position to report; -1: outputs only


class RequestOptions(Struct):
    """How the engine schedules and caches a request. Filled by name from the body's fields (`OptionFields`)."""

    priority: int = 0  # higher runs first
    cache_salt: str = ""
    extra_key: str = ""
    no_store: bool = False  # leave nothing in the cache
    lora_name: str = ""  # adapter that computes it; empty: the base model alone


class Grammar(Struct):
    """What an answer must match. `text` is llguidance's grammar: Lark, or JSON of its grammar list; "": anything."""

    text: str
    begins_after: tuple[int, ...] = ()  # free text until these tokens have been generated; empty: from the first token
    opens_with: int | None = None  # there is free text only if the first token is this one; None: there always is
    begins_within: int | None = None  # after so many tokens of free text, `begins_after` is forced


class Generate(Struct, tag="generate"):
    """Run one request. Answered by `Outputs` entries, the last of which has `finish`."""

    rid: str
    prompt_ids: bytes  # int32[n], n >= 1, see pack_ids
    sampling: SamplingParams
    logprobs: LogprobParams | None = None
    options: RequestOptions = RequestOptions()
    grammar: Grammar | None = None
    output_interval: int = 1  # tokens in an output; the first token comes alone, the last output is what is left
    pooling: Pooling | None = None  # wants the prompt's embedding; with max_new_tokens of 0
    account: int = 0  # number of the key that its client used; one account cannot fill the queue


class GenerateBatch(Struct, tag="generate_batch"):
    """Run several requests, which arrive in one turn so that one step can begin with all of them. Answered as each."""

    items: tuple[Generate, ...]


class Abort(Call, tag="abort"):
    """End requests. With `match="prefix"` every rid that begins with `rid`; `match="all"` ignores `rid`.

    Answered by `Done` (an unknown rid is not an error); each ended request also gets its last output.
    `message` is the reason that this output reports.
    """

    rid: str = ""
    match: Literal["exact", "prefix", "all"] = "exact"
    message: str = "aborted"


class TokenLogprob(Struct, array_like=True):
    """Log-probability of one token at one position, with the alternatives asked for."""

    token_id: int
    logprob: float | None  # None: the first prompt token, which nothing predicts
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()
    ids_logprobs: tuple[float, ...] = ()  # in the order of LogprobParams.token_ids


class Finish(Struct):
    """Why a request ended. `matched` is the stop token; what follows `message` is for `abort` only.

    `status` is an HTTP status, `code` a word for programs, `retry_after_s` when to try again.
    """

    type: Literal["stop", "length", "abort"]
    matched: int | str | None = None
    message: str = ""
    status: int = 0
    err_type: str = ""
    code: str = ""
    retry_after_s: int = 0  # 0: unknown


class OutputMeta(Struct):
    """Facts of a request besides its tokens; sent with its first and its last output."""

    prompt_tokens: int
    cached_device: int = 0  # prompt tokens found on each tier
    cached_host: int = 0
    cached_storage: int = 0
    num_retractions: int = 0
    cache_generation: int = 0
    weight_version: str = ""
    weights_versions: tuple[tuple[str, int], ...] = ()  # (label, first output position), if more than one
    queue_time_s: float = 0.0  # from its arrival to its start, waiting for pages included
    load_time_s: float = 0.0  # of that, while its pages were copied from a lower tier
    num_draft_steps: int = 0  # steps that verified drafted tokens
    num_drafted: int = 0  # tokens
    num_accepted: int = 0  # of them


class Output(Struct, array_like=True):
    """What one step produced for one request."""

    rid: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None  # once, with the first token
    finish: Finish | None = None
    meta: OutputMeta | None = None
    embedding: bytes | None = None  # float32[hidden_size] of length 1, with the last output of a request with `pooling`


class Outputs(Struct, tag="outputs"):
    """All outputs of one turn for one client: one message per step."""

    items: tuple[Output, ...]
