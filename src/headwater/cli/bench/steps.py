"""`headwater bench steps`: steps of a model on this CPU, without a server, beside what the machine could do."""

import json
from typing import TYPE_CHECKING, Any

import click

from headwater.cli.command_line import command

if TYPE_CHECKING:
    from headwater.profiling.step_profile import StepProfile

_CASES = ("1x200", "16x200", "512+0")


@command("steps")
@click.option("--model", help="Name, folder, .gguf file or hub id. Default: the default model, which is fetched once.")
@click.option("--profile", "has_kinds", is_flag=True, help="Show the time by kind of op.")
@click.option(
    "--case",
    "cases",
    multiple=True,
    default=_CASES,
    show_default=True,
    help="ROWSxCONTEXT: a decode of each row. TOKENS+CONTEXT: a chunk of a prompt. Can be repeated.",
)
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto")
@click.option("--quantization", type=click.Choice(["none", "int8", "int4", "fp8"]), default="none")
@click.option(
    "--load-format",
    type=click.Choice(["auto", "dummy"]),
    default="auto",
    help="dummy: random weights for the config.json of a folder.",
)
@click.option("--threads", type=click.IntRange(1, 1024), help="Compute threads. Default: the available cores.")
@click.option("--repeat", type=click.IntRange(min=1), default=10, show_default=True, help="Steps of each case.")
@click.option("--json", "is_json", is_flag=True, help="Print JSON.")
def steps(model: str | None, has_kinds: bool, cases: tuple[str, ...], repeat: int, is_json: bool, **load: Any) -> None:
    """Measure steps of a model on this CPU, without a server.

    The floor of a step is the sum over its products and its attention. For each, the longer one of two times counts:
    that of reading its bytes, and that of its arithmetic. Both rates are measured directly before and after the step.
    Compare runs by the ratio to the floor, since both vary on a shared machine.
    """
    from headwater.devices.cpu.kernel_library import kernels_origin, usable_kernels
    from headwater.launch.config import ServerArgs
    from headwater.launch.model_choice import with_model
    from headwater.profiling.step_cases import StepCase
    from headwater.profiling.step_profile import load_for_profile

    try:
        steps = [StepCase.parse(case) for case in cases]
        if has_kinds and usable_kernels() is None:
            raise ValueError(f"--profile measures the kernels, and there are none: {kernels_origin()}")
        path = with_model(ServerArgs(model=model)).model
        assert path is not None
        profiled = load_for_profile(path, cases=steps, **load)
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from None
    results = []
    for step in steps:
        result = profiled.measure(step, repeat=repeat)
        results.append(result)
        if not is_json:
            print_profile(result, has_kinds=has_kinds)
    if is_json:
        click.echo(json.dumps([result.as_json() for result in results], indent=1))


def print_profile(result: "StepProfile", *, has_kinds: bool) -> None:
    """A line about the step, and with `has_kinds` a table by kind of op."""
    line = f"{result.case.name:22} {result.best_ms:9.2f} ms, median {result.median_ms:.2f} ms, "
    line += f"{result.tokens_per_s:,.1f} tokens/s"
    speed = result.speed
    if speed is not None:
        line += f"; floor {result.floor_ms:.2f} ms, ratio {result.best_ms / result.floor_ms:.2f} "
        line += f"({speed.read_gb_s:.0f} GB/s, {speed.gflop_s:.0f} GFLOP/s, int8 {speed.int8_gop_s:.0f} GOP/s)"
    click.echo(line)
    if not has_kinds:
        return
    click.echo(f"  {'':20} {'ops':>5} {'ms':>9} {'share':>6} {'floor ms':>9} {'GB/s':>7} {'GOP/s':>7}")
    for kind in result.kinds:
        share = f"{100 * kind.ms / result.best_ms:.0f} %"
        numbers = [f"{value:.1f}" if value else "" for value in (kind.gb_s, kind.gop_s)]
        floor = f"{kind.floor_ms:.2f}" if kind.floor_ms else ""
        click.echo(
            f"  {kind.kind:20} {kind.num_ops or '':>5} {kind.ms:9.2f} {share:>6} {floor:>9} "
            f"{numbers[0]:>7} {numbers[1]:>7}"
        )
