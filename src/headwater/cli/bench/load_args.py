"""The options of `headwater bench`. Imports nothing heavy."""

from typing import Annotated, Literal

import msgspec

from headwater.launch.flags import Flag, read_flags
from headwater.server.address import DEFAULT_URL

ApiName = Literal["chat", "completions", "generate"]

SERVERS, WORKLOAD, LOAD, RESULTS = "Servers", "Workload", "Load", "Results"


class LoadArgs(msgspec.Struct, kw_only=True, frozen=True):
    """Each field is an option. ValueError for a value out of range, and for options that exclude each other."""

    url: Annotated[str, Flag("Address of the server.", SERVERS, env="HEADWATER_URL")] = DEFAULT_URL
    api: Annotated[
        ApiName, Flag("OpenAI's /v1/chat/completions or /v1/completions, or SGLang's /generate.", SERVERS)
    ] = "chat"
    model: Annotated[str | None, Flag("Name of the model. Default: the first that the server lists.", SERVERS)] = None
    against: Annotated[
        str | None, Flag("Address of a second server: rounds alternate (A B A B), and ratios are printed.", SERVERS)
    ] = None
    against_api: Annotated[ApiName | None, Flag("API of the second server. Default: that of the first.", SERVERS)] = (
        None
    )
    against_model: Annotated[
        str | None, Flag("Model of the second server. Default: the first that it lists.", SERVERS)
    ] = None
    api_key: Annotated[
        str | None, Flag("Key for requests, on both servers.", SERVERS, env="HEADWATER_API_KEY", is_secret=True)
    ] = None
    admin_key: Annotated[
        str | None,
        Flag("Key for flushes. Default: --api-key.", SERVERS, env="HEADWATER_ADMIN_API_KEY", is_secret=True),
    ] = None
    requests: Annotated[
        int | None,
        Flag("Requests of a round. Default: 100, with --trace all of its lines.", WORKLOAD, low=1, high=10_000_000),
    ] = None
    user_tokens: Annotated[int, Flag("New prompt tokens of a request.", WORKLOAD, low=1, high=10_000_000)] = 256
    output_tokens: Annotated[int, Flag("Tokens of an answer.", WORKLOAD, low=1, high=10_000_000)] = 128
    lengths: Annotated[
        Literal["fixed", "exponential"],
        Flag("Whether these two are exact, or means of an exponential distribution.", WORKLOAD),
    ] = "fixed"
    prefix_tokens: Annotated[
        int, Flag("Tokens of a prefix that requests share. 0: nothing is shared.", WORKLOAD, low=0, high=10_000_000)
    ] = 0
    prefixes: Annotated[int, Flag("How many such prefixes there are.", WORKLOAD, low=1, high=1_000_000)] = 1
    zipf: Annotated[float, Flag("Skew of their popularity; 0: all alike.", WORKLOAD, low=0, high=10)] = 1.0
    session_turns: Annotated[
        int, Flag("Turns of a conversation; each prompt has all earlier turns.", WORKLOAD, low=1, high=1000)
    ] = 1
    think_s: Annotated[float, Flag("Mean seconds from an answer to the next turn.", WORKLOAD, low=0, high=3600)] = 0.0
    trace: Annotated[
        str | None, Flag("JSONL file of requests, of Headwater's or Mooncake's format, instead of these.", WORKLOAD)
    ] = None
    trace_speed: Annotated[float, Flag("Replay a trace this many times faster.", WORKLOAD, low=1e-6, high=1e6)] = 1.0
    prompts: Annotated[
        Literal["words", "ids"],
        Flag("Prompts of common words, or of random token ids (completions and generate).", WORKLOAD),
    ] = "words"
    vocab_size: Annotated[
        int, Flag("Size of the vocabulary that ids are drawn from.", WORKLOAD, low=200, high=10_000_000)
    ] = 30_000
    seed: Annotated[int, Flag("Another seed: other lengths, arrivals and texts.", WORKLOAD, low=0)] = 0
    concurrency: Annotated[
        int | None,
        Flag(
            "Closed loop: this many conversations run at a time (default 16). With --rate or a trace's times: at most "
            "so many, and waiting counts as latency.",
            LOAD,
            low=1,
            high=4096,
        ),
    ] = None
    rate: Annotated[
        float | None, Flag("Open loop: requests a second that arrive by Poisson.", LOAD, low=1e-6, high=1e6)
    ] = None
    ignore_arrivals: Annotated[bool, Flag("Send a trace in a closed loop, whatever its times are.", LOAD)] = False
    rounds: Annotated[
        int | None, Flag("Rounds on each server. Default: 1, with --against 3.", LOAD, low=1, high=1000)
    ] = None
    flush: Annotated[str, Flag("Tiers that are flushed before each round (where there are), or none.", LOAD)] = (
        "device,host,storage"
    )
    flush_timeout: Annotated[float, Flag("Seconds that a flush may wait.", LOAD, low=0, high=3600)] = 30.0
    repeat_prompts: Annotated[
        bool, Flag("Send the same texts in every round. With --flush none, later rounds find them cached.", LOAD)
    ] = False
    warm_up: Annotated[int, Flag("Requests before the first round, not measured.", LOAD, low=0, high=10_000)] = 16
    temperature: Annotated[float, Flag("Sampling temperature.", LOAD, low=0, high=10)] = 0.0
    keep_eos: Annotated[
        bool, Flag("Let answers end early. By default ignore_eos is sent, so that lengths are exact.", LOAD)
    ] = False
    timeout: Annotated[float, Flag("Seconds that one answer may take.", LOAD, low=0.001, high=86_400)] = 600.0
    slo: Annotated[
        str | None,
        Flag("Goals in ms, for goodput: ttft=200,itl=50. Also tpot and e2e.", RESULTS),
    ] = None
    html: Annotated[str | None, Flag("Write a page with plots to this file.", RESULTS)] = None
    json: Annotated[str | None, Flag("Write all figures and requests to this file.", RESULTS)] = None

    def __post_init__(self) -> None:
        for name, spec in LOAD_FLAGS.items():
            spec.check(getattr(self, name))
        if self.trace is not None and self.rate is not None:
            raise ValueError("--rate and --trace exclude each other: a trace has its own arrivals (--trace-speed)")
        if self.ignore_arrivals and self.trace is None:
            raise ValueError("--ignore-arrivals needs --trace")
        if self.against is None and (self.against_api or self.against_model):
            raise ValueError("--against-api and --against-model need --against")

    @property
    def is_open(self) -> bool:
        """Whether requests have times of their own."""
        return self.rate is not None or (self.trace is not None and not self.ignore_arrivals)

    @property
    def num_rounds(self) -> int:
        return self.rounds or (1 if self.against is None else 3)


LOAD_FLAGS = read_flags(LoadArgs)
