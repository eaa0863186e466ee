"""The options of `headwater simulate --plan`: the workload and the fleets. Imports nothing heavy."""

from pathlib import Path
from typing import Annotated, Literal

import msgspec

from headwater.planning.hardware import HARDWARE
from headwater.planning.model_shape import MODELS

FLUSH_OPTIONS = frozenset({"flush_timeout", "flush_streams", "loss", "faults", "flushes"})  # they need `fleet_flush`


class PlanArgs(msgspec.Struct, kw_only=True, frozen=True):
    """Each field is an option of the command line. Options with lists make one fleet for every combination."""

    trace: Annotated[Path | None, "JSONL file with requests; without it, a synthetic workload."] = None
    model: Annotated[str, f"A config.json, its folder, or one of {', '.join(MODELS)}."] = "llama-3.1-8b"
    hardware: Annotated[str, f"A JSON file, or one of {', '.join(HARDWARE)}."] = "h100"
    engines: Annotated[str, "Number of engines; a list compares fleets: 1,2,4."] = "1"
    tp_size: Annotated[str, "Devices of each engine, of --hardware, with a share of the model each; a list: 1,2."] = "1"
    device_gb: Annotated[str, "KV memory of each engine in GB; a list. Default: all that the weights leave."] = ""
    host_gb: Annotated[str, "Host memory of each engine for KV in GB; a list."] = "0"
    storage_gb: Annotated[str, "Size of the store that all engines share in GB; a list."] = "0"
    page_size: Annotated[int, "Tokens of a page."] = 16
    max_running: Annotated[int | None, "Requests that run at once in an engine. Default: 256, on CPU 64."] = None
    chunk_tokens: Annotated[int | None, "Prompt tokens of a request in one step. Default: 2048; CPU: 512."] = None
    schedule_policy: Annotated[Literal["fcfs", "lpm"], "Order of the queue."] = "fcfs"
    write_policy: Annotated[
        Literal["write_through", "write_through_selective", "write_back"],
        "When pages are copied to the host.",
    ] = "write_through"
    prefetch_policy: Annotated[
        Literal["best_effort", "wait_complete", "timeout"],
        "How long a request waits for the store.",
    ] = "timeout"
    requests: Annotated[int, "Synthetic: number of requests."] = 1000
    rate: Annotated[float, "Synthetic: mean requests per second."] = 2.0
    prefixes: Annotated[int, "Synthetic: number of prefixes that sessions share."] = 20
    prefix_tokens: Annotated[int, "Synthetic: tokens of each shared prefix."] = 1000
    zipf: Annotated[float, "Synthetic: skew of the prefixes' popularity; 0: none."] = 1.0
    session_turns: Annotated[int, "Synthetic: requests of a session."] = 3
    think_s: Annotated[float, "Synthetic: mean seconds from an answer to the next turn."] = 10.0
    user_tokens: Annotated[int, "Synthetic: mean new prompt tokens of a turn."] = 100
    output_tokens: Annotated[int, "Synthetic: mean tokens of an answer."] = 200
    fleet_flush: Annotated[
        int, "Instead of a workload: flush a fleet of so many replicas. The other options follow."
    ] = 0
    flush_timeout: Annotated[str, "Fleet flush: timeout of each flush in seconds; a list."] = "1,5"
    flush_streams: Annotated[str, "Fleet flush: requests that run on each replica; a list."] = "8,64"
    loss: Annotated[str, "Fleet flush: share of all messages and answers that are lost; a list."] = "0,0.01"
    faults: Annotated[float, "Fleet flush: share of replicas killed or stopped for a while around each flush."] = 0.01
    flushes: Annotated[int, "Fleet flush: number of flushes."] = 10
    html: Annotated[Path | None, "Write an HTML page with charts to this file."] = None
    png: Annotated[Path | None, "Write the charts to this file (needs headwater[plot])."] = None
    json: Annotated[Path | None, "Write the figures to this file."] = None

    def changed(self) -> list[str]:
        """Names of the fields whose values are not the defaults."""
        return [each.name for each in msgspec.structs.fields(self) if getattr(self, each.name) != each.default]

    def describe_workload(self, num_requests: int) -> str:
        """The workload in a sentence."""
        if self.trace is not None:
            return f"{num_requests} requests of {self.trace.name}"
        return (
            f"{num_requests} requests, {self.rate:g} a second, in sessions of {self.session_turns}; {self.prefixes} "
            f"shared prefixes of {self.prefix_tokens} tokens (Zipf {self.zipf:g}), {self.user_tokens} new tokens a "
            f"turn, answers of {self.output_tokens}"
        )
