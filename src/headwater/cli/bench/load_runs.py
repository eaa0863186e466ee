"""The work of `headwater bench`, after its options are parsed."""

import asyncio
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import click
from rich.console import Console

from headwater.bench.apis import APIS, Settings
from headwater.bench.arrivals import faster, from_zero, sessions_of
from headwater.bench.connection import ConnectionBroke, HttpClient
from headwater.bench.conversation import PromptWriter
from headwater.bench.flushing import parse_tiers
from headwater.bench.load import Pace, Target
from headwater.bench.preparing import first_model, warm_up, words_per_token
from headwater.bench.record import record_of
from headwater.bench.report import report
from headwater.bench.slo import Slo
from headwater.bench.tables import print_comparison, print_round
from headwater.bench.turns import Plan, Round, play_rounds, ratios
from headwater.cli.bench.load_args import LoadArgs
from headwater.cli.bench.progress import Progress
from headwater.planning.synthetic import SyntheticWorkload
from headwater.planning.trace import PlannedRequest, read_trace

DEFAULT_REQUESTS, DEFAULT_CONCURRENCY = 100, 16


def run_load(args: LoadArgs) -> bool:
    """All rounds, tables and files. Whether every request got its answer. ValueError for bad options."""
    for path in (args.html, args.json):
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise ValueError(f"{Path(path).parent} is no folder")
    trace = workload_of(args)
    slo = None if args.slo is None else Slo.parse(args.slo)
    plan = plan_of(args, trace, slo)
    writer = PromptWriter(APIS[args.api], vocab_size=args.vocab_size if args.prompts == "ids" else None)
    writer.check(trace)
    console = Console()
    console.print(describe(args, plan, len(trace)), highlight=False)
    try:
        targets, rounds = asyncio.run(_rounds(args, plan, writer, console))
    except ConnectionBroke as error:
        click.secho(str(error), err=True, fg="red")
        return False
    found = ratios(rounds)
    if found:
        print_comparison(console, rounds, found)
    _write_files(args, plan, targets, rounds, num_requests=len(trace))
    return not any(each.figures.num_failed for each in rounds)


def workload_of(args: LoadArgs) -> list[PlannedRequest]:
    """The requests of a round. ValueError for an unreadable file."""
    if args.trace is not None:
        return faster(read_trace(Path(args.trace))[: args.requests], args.trace_speed)
    synthetic = SyntheticWorkload(
        num_requests=args.requests or DEFAULT_REQUESTS,
        requests_per_s=args.rate or 1.0,
        num_prefixes=args.prefixes,
        prefix_tokens=args.prefix_tokens,
        zipf=args.zipf,
        turns_per_session=args.session_turns,
        think_s=args.think_s,
        user_tokens=args.user_tokens,
        output_tokens=args.output_tokens,
        has_exact_lengths=args.lengths == "fixed",
        seed=args.seed,
    )
    return synthetic.requests()


def plan_of(args: LoadArgs, trace: Sequence[PlannedRequest], slo: Slo | None) -> Plan:
    """What is done with each server."""
    limit = args.concurrency if args.is_open else args.concurrency or DEFAULT_CONCURRENCY
    return Plan(
        sessions=from_zero(sessions_of(trace)),
        pace=Pace(is_open=args.is_open, num_at_once=limit),
        num_rounds=args.num_rounds,
        flush_tiers=parse_tiers(args.flush),
        flush_timeout_s=args.flush_timeout,
        slo=slo,
    )


def describe(args: LoadArgs, plan: Plan, num_requests: int) -> str:
    """The workload in a sentence."""
    if args.trace is not None:
        what = f"{num_requests} requests of {Path(args.trace).name}"
        what += f", {args.trace_speed:g} times faster" if args.trace_speed != 1.0 else ""
    else:
        mean = "about " if args.lengths == "exponential" else ""
        what = f"{num_requests} requests of {mean}{args.user_tokens} + {mean}{args.output_tokens} tokens"
        if args.prefix_tokens:
            what += f" behind {args.prefixes} shared prefixes of {args.prefix_tokens} (Zipf {args.zipf:g})"
        if args.session_turns > 1:
            what += f", in conversations of {args.session_turns} turns"
    limit = plan.pace.num_at_once
    if not plan.pace.is_open:
        how = f"closed loop, {limit} at a time"
    else:
        how = "at the times of the trace" if args.rate is None else f"Poisson, {args.rate:g} a second"
        how += f", at most {limit} at a time" if limit else ""
    return f"{what}; {how}; {args.prompts}, seed {args.seed}"


async def _rounds(
    args: LoadArgs, plan: Plan, writer: PromptWriter, console: Console
) -> tuple[list[Target], list[Round]]:
    with _targets(args) as targets:
        for index, target in enumerate(targets):
            model = (args.model, args.against_model)[index] or await first_model(target.http)
            settings = Settings(model, temperature=args.temperature, ignores_eos=not args.keep_eos)
            targets[index] = target._replace(settings=settings)
        if args.prompts == "words":
            writer = writer.with_words(await words_per_token(targets[0]))
        for target in targets:
            first, at_once = plan.sessions[: args.warm_up], plan.pace.num_at_once or DEFAULT_CONCURRENCY
            if first:
                await warm_up(target, first, writer.of(target.api, salt="warm-up"), num_at_once=at_once)

        def writer_of(target: Target, number: int) -> PromptWriter:
            return writer.of(target.api, salt=f"{args.seed}/{0 if args.repeat_prompts else number}")

        with Progress(num_requests=sum(len(each.turns) for each in plan.sessions)) as progress:

            def on_end(each: Round) -> None:
                progress.stop()
                print_round(console, each, slo=plan.slo)

            rounds = await play_rounds(targets, plan, writer_of, on_start=progress.start, on_end=on_end)
        return targets, rounds


@contextmanager
def _targets(args: LoadArgs) -> Iterator[list[Target]]:
    """The servers, their models not yet known. ValueError for a malformed address."""
    key = args.api_key and args.api_key.partition(",")[0]
    targets = []
    for url, api in ((args.url, args.api), (args.against, args.against_api or args.api)):
        if url is not None:
            http, control = HttpClient(url, key=key), HttpClient(url, key=args.admin_key or key)
            name = url.partition("://")[2].rstrip("/")
            targets.append(Target(name, http, control, APIS[api], Settings(""), timeout_s=args.timeout))
    if len({target.name for target in targets}) < len(targets):
        targets = [
            target._replace(name=f"{letter} {target.name}") for letter, target in zip("AB", targets, strict=True)
        ]
    try:
        yield targets
    finally:
        for client in itertools.chain.from_iterable((target.http, target.control) for target in targets):
            client.close()


def _write_files(
    args: LoadArgs, plan: Plan, targets: Sequence[Target], rounds: Sequence[Round], *, num_requests: int
) -> None:
    workload, found = describe(args, plan, num_requests), ratios(rounds)
    if args.json is not None:
        servers = [{"name": t.name, "api": t.api.path, "model": t.settings.model} for t in targets]
        record = record_of(rounds, workload=workload, servers=servers, found=found)
        Path(args.json).write_text(json.dumps(record, indent=1) + "\n")
    if args.html is not None:
        facts = [f"{t.name}: {t.settings.model} through {t.api.path}" for t in targets]
        text = report(rounds, workload=workload, facts=facts, found=found, slo=plan.slo)
        Path(args.html).write_text(text, encoding="utf-8")
    for path in (args.json, args.html):
        if path is not None:
            print(f"written: {path}", file=sys.stderr)
