"""`headwater bench`: load for a running server, or two in turns; `bench steps`: a model's steps without a server."""

from typing import Any

import click

from headwater.cli.bench.load_args import LOAD_FLAGS, LoadArgs
from headwater.cli.bench.steps import steps
from headwater.cli.command_line import SETTINGS, SectionedGroup, flag_option


@click.pass_context
def _bench(context: click.Context, **options: Any) -> None:
    """Put load on a running server, and report what its clients see.

    Works with every server that has OpenAI's API or SGLang's. Without --rate and --trace, --concurrency conversations
    run at a time (closed loop). Before each round the cache is flushed, and the report says what was cold. Latencies
    count from the moment at which a request was due. `headwater bench steps` measures a model without a server.
    """
    if context.invoked_subcommand is not None:
        return
    try:
        args = LoadArgs(**options)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None
    # imported here: a wrong option is answered before these imports would finish
    from headwater.cli.bench.load_runs import run_load

    try:
        has_answers = run_load(args)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None
    except KeyboardInterrupt:
        raise click.exceptions.Exit(130) from None
    if not has_answers:
        raise click.exceptions.Exit(1)


bench = SectionedGroup(
    "bench",
    callback=_bench,
    help=_bench.__doc__,
    params=[flag_option(name, spec) for name, spec in LOAD_FLAGS.items()],
    commands=[steps],
    invoke_without_command=True,
    context_settings=SETTINGS,
)
