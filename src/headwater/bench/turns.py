"""Rounds on one server, or on two in turns: A B A B, each with the same requests, so that both see the same machine."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from headwater.bench.arrivals import Session
from headwater.bench.conversation import PromptWriter
from headwater.bench.exchange import Exchange, Watched
from headwater.bench.flushing import Cold, flush
from headwater.bench.load import Pace, Target, play
from headwater.bench.machine import ForeignLoad, processes_of_server
from headwater.bench.slo import Slo
from headwater.bench.statistics import Figures, figures_of

RATIOS = (  # name, what it is, whether more is better
    ("output tokens/s", lambda figures: figures.output_tokens_per_s, True),
    ("requests/s", lambda figures: figures.requests_per_s, True),
    ("TTFT p50", lambda figures: figures.ttft_s.p50, False),
    ("TTFT p99", lambda figures: figures.ttft_s.p99, False),
    ("ITL p50", lambda figures: figures.itl_s.p50, False),
    ("ITL p99", lambda figures: figures.itl_s.p99, False),
    ("end to end p50", lambda figures: figures.e2e_s.p50, False),
)


@dataclass(frozen=True, slots=True)
class Round:
    """One round on one server."""

    number: int
    server: str
    cold: Cold
    exchanges: Sequence[Exchange]
    figures: Figures
    client_cpu_s: float
    foreign_cores: float | None  # None: unknown

    @property
    def client_us_per_token(self) -> float:
        """Processor time of the load generator for each token that it received, with the requests' share."""
        return 1e6 * self.client_cpu_s / max(1, self.figures.num_output_tokens)

    @property
    def client_cores(self) -> float:
        return self.client_cpu_s / self.figures.duration_s


@dataclass(frozen=True, slots=True)
class Plan:
    """What is done with each server."""

    sessions: Sequence[Session]
    pace: Pace
    num_rounds: int
    flush_tiers: tuple[str, ...]
    flush_timeout_s: float
    slo: Slo | None = None


async def play_rounds(
    targets: Sequence[Target],
    plan: Plan,
    writer_of: Callable[[Target, int], PromptWriter],
    *,
    on_start: Callable[[Target, int, Watched], None],
    on_end: Callable[[Round], None],
) -> list[Round]:
    """All rounds. `writer_of` a target and a round makes the prompts, which differ from round to round."""
    rounds = []
    for number in range(plan.num_rounds):
        for target in targets:
            cold = await flush(target.control, plan.flush_tiers, timeout_s=plan.flush_timeout_s)
            watched = Watched()
            on_start(target, number, watched)
            local = [each.http for each in targets if each.http.is_on_this_machine]
            own = [pid for http in local for pid in processes_of_server(http.port)]
            load, cpu_s = ForeignLoad(own), time.process_time()
            exchanges = await play(
                target, plan.sessions, writer=writer_of(target, number), pace=plan.pace, watched=watched
            )
            result = Round(
                number=number,
                server=target.name,
                cold=cold,
                exchanges=exchanges,
                figures=figures_of(exchanges, slo=plan.slo),
                client_cpu_s=time.process_time() - cpu_s,
                foreign_cores=load.cores(),
            )
            rounds.append(result)
            on_end(result)
    return rounds


@dataclass(frozen=True, slots=True)
class Ratio:
    """How much better the first server was in one figure: above 1 it was."""

    name: str
    median: float
    least: float
    most: float


def ratios(rounds: Sequence[Round]) -> list[Ratio]:
    """Of two servers, round by round: neighbours in time are compared. Without rounds of two, empty."""
    names = list(dict.fromkeys(each.server for each in rounds))
    if len(names) != 2:
        return []
    by_turn = {(each.server, each.number): each.figures for each in rounds}
    found = []
    for name, value, is_more_better in RATIOS:
        pairs = [
            (value(by_turn[names[0], number]), value(by_turn[names[1], number]))
            for number in sorted({each.number for each in rounds})
        ]
        quotients = [(a / b if is_more_better else b / a) for a, b in pairs if a > 0 and b > 0]
        if quotients:
            found.append(Ratio(name, statistics.median(quotients), min(quotients), max(quotients)))
    return found
