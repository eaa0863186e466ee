"""Flags of scheduling and of the processes."""

from typing import Annotated, Literal

from headwater.launch.cache_args import CacheArgs
from headwater.launch.flags import Flag

SCHEDULE = "Scheduling"
PROCESS = "Processes"


class EngineArgs(CacheArgs, kw_only=True, frozen=True, omit_defaults=True):
    """How requests are scheduled, and by which processes and threads."""

    max_running_requests: Annotated[
        int | None, Flag("Most running requests. Default: 64 on CPU, 256 on a GPU.", SCHEDULE, low=1, high=4096)
    ] = None
    max_queued_requests: Annotated[
        int, Flag("Most waiting requests; one more gets 429.", SCHEDULE, low=0, high=1_000_000)
    ] = 1024
    max_queued_tokens: Annotated[
        int | None,
        Flag(
            "Most prompt tokens of waiting requests; a request beyond gets 429, unless none waits. Default: no limit.",
            SCHEDULE,
            low=1,
        ),
    ] = None
    max_queue_share: Annotated[
        float | None,
        Flag(
            "Share of the queue that the requests of one key may hold. Default: 0.5 with several --api-key, else 1.",
            SCHEDULE,
            low=0.001,
            high=1,
        ),
    ] = None
    max_concurrency_per_key: Annotated[
        int | None,
        Flag(
            "Most HTTP requests of one key that generate at the same time; one more gets 429. Clients without a key "
            "count as one. Default: no limit.",
            SCHEDULE,
            low=1,
            high=1_000_000,
        ),
    ] = None
    queue_timeout: Annotated[
        float | None,
        Flag(
            "Seconds that a request may wait before it starts; then it gets 503. Default: no limit.",
            SCHEDULE,
            low=0.001,
            high=86400,
        ),
    ] = None
    request_timeout: Annotated[
        float | None,
        Flag(
            "Seconds from the arrival of a request to the end of its answer; then it ends with 504. Default: no limit.",
            SCHEDULE,
            low=0.001,
            high=86400,
        ),
    ] = None
    chunked_prefill_size: Annotated[
        int | None,
        Flag("Most prompt tokens of one request in a step. Default: 8192; on CPU 512 or less.", SCHEDULE, low=1),
    ] = None
    max_step_tokens: Annotated[
        int | None,
        Flag(
            "Most tokens of a step, prefill and decode together. Default: chunk size plus running requests.",
            SCHEDULE,
            low=1,
            also=("--max-prefill-tokens",),
        ),
    ] = None
    max_gap_ms: Annotated[
        float | None,
        Flag(
            "Milliseconds that prompts may leave between two tokens of a stream: a step beside streams computes as "
            "many prompt tokens as fit in them. Default: 200 on CPU without --chunked-prefill-size; else no limit.",
            SCHEDULE,
            low=1,
            high=60_000,
        ),
    ] = None
    schedule_policy: Annotated[
        Literal["fcfs", "lpm"],
        Flag("Order of the queue: first come first served, or longest prefix match.", SCHEDULE),
    ] = "fcfs"

    speculative_algorithm: Annotated[
        Literal["none", "ngram", "tree", "NGRAM"],
        Flag(
            "Draft the next tokens of an answer and verify them in one step. ngram: as the request's own text went on "
            "before. tree: as cached texts go on after the same text, or as ngram. NGRAM: SGLang's word.",
            SCHEDULE,
        ),
    ] = "none"
    speculative_num_draft_tokens: Annotated[
        int, Flag("Most tokens drafted for a request in a step.", SCHEDULE, low=1, high=31)
    ] = 12

    grammar_max_bytes: Annotated[
        int, Flag("Most bytes of a request's grammar; a longer one gets 400.", SCHEDULE, low=1)
    ] = 1 << 20
    grammar_compile_timeout: Annotated[
        float,
        Flag("Seconds that compiling a grammar may take; then its requests get 400.", SCHEDULE, low=0.01, high=600),
    ] = 10.0
    grammar_cache_size: Annotated[
        int, Flag("Compiled grammars kept for later requests.", SCHEDULE, low=0, high=1_000_000)
    ] = 256

    threads: Annotated[
        int | None,
        Flag(
            "Compute threads of each engine. Default: the available cores, divided among the engines.",
            PROCESS,
            low=1,
            high=1024,
        ),
    ] = None
    pin_threads: Annotated[
        Literal["auto", "on", "off"],
        Flag(
            "Keep compute threads on cores of their own, and the API process off these cores. auto: with 4 cores or "
            "more, if all of them compute.",
            PROCESS,
        ),
    ] = "auto"
    engine_restarts: Annotated[
        int,
        Flag(
            "Restarts of each engine process before the server gives up.",
            PROCESS,
            low=0,
            high=1000,
        ),
    ] = 0
    fleet_replica: Annotated[
        bool,
        Flag(
            "Be a replica of a fleet (`headwater fleet up` sets it): take its messages with the admin key, on one "
            "engine that is not restarted.",
            PROCESS,
        ),
    ] = False
    dp_size: Annotated[
        int,
        Flag(
            "Engine processes (replicas), each with its own weights and KV cache; on GPUs one card each.",
            PROCESS,
            low=1,
            high=64,
            also=("--data-parallel-size", "--dp"),
        ),
    ] = 1
    tp_size: Annotated[
        int,
        Flag(
            "Ranks of each engine (tensor parallelism): processes that compute every step together, each with its "
            "share of the heads; on GPUs one card each.",
            PROCESS,
            low=1,
            high=64,
            also=("--tensor-parallel-size", "--tp"),
        ),
    ] = 1
    share_gpus: Annotated[
        bool,
        Flag(
            "Where there are fewer GPUs than engines (--dp-size), put several engines on one; each takes its part of "
            "the memory.",
            PROCESS,
        ),
    ] = False
    rank_timeout: Annotated[
        float,
        Flag(
            "Seconds that a rank may be silent, or stay at a step, before its engine ends and is started again.",
            PROCESS,
            low=1,
            high=86400,
        ),
    ] = 60.0
