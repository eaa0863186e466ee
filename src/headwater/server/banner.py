"""The banner of `headwater serve`."""

import os
import shlex
import shutil
import socket
import sys
from collections.abc import Sequence

import click

from headwater.generation.model_facts import ModelFacts
from headwater.messages.state import ComputeFacts, EngineReady, GpuKernels
from headwater.server.address import DEFAULT_URL, own_url
from headwater.server.signs_of_life import process_age_s
from headwater.version import version


def print_banner(
    model: ModelFacts,
    ready: EngineReady,
    *,
    listener: socket.socket,
    num_engines: int = 1,
    num_ranks: int = 1,
    gpus: Sequence[Sequence[int]] = (),
    needs_key: bool = False,
    has_dashboard: bool = True,
) -> None:
    """Print the server's address and model, the time of the start, and a command to chat with it.

    `gpus`: of each engine's ranks.
    """
    url = own_url(listener)
    tokens = ready.num_pages * ready.page_size
    mib = ready.num_pages * ready.page_bytes / (1 << 20)
    numbers = f", {ready.dtype} on " if ready.compute is None else " on "
    click.echo(  # not rich's console: its import would take longer than the first answer
        f"{_bold(f'Headwater {version()}')} serves {_bold(model.served_name)} "
        f"({ready.architecture}{numbers}{ready.device}), ready in {process_age_s():.1f} s"
    )
    lines = [] if ready.compute is None else compute_lines(ready.compute)
    lines += [] if ready.gpu_kernels is None else gpu_lines(ready.gpu_kernels)
    for line in lines:
        click.echo(f"  {line}")
    if num_ranks > 1:
        on_cpu = "with the threads and about the share of weights above"
        share = on_cpu if ready.compute is not None else "on a GPU of its own"
        click.echo(f"  Ranks    {num_ranks} of each engine, each {share}")
    if any(gpus):
        click.echo(f"  GPUs     {gpus_in_words(gpus)}")
    click.echo(f"  API      {url}/v1  (OpenAI), {url}/generate  (SGLang)")
    click.echo(f"  Docs     {url}/docs")
    click.echo(f"  Metrics  {url}/metrics")
    if has_dashboard:
        click.echo(f"  Watch    {url}/dashboard")
    each = f" in each of {num_engines} engines" if num_engines > 1 else ""
    click.echo(f"  KV cache {tokens:,} tokens in {ready.num_pages:,} pages of {ready.page_size}, {mib:,.0f} MiB{each}")
    click.echo(f"  Try      {chat_command(url, needs_key=needs_key)}    (Ctrl-C here ends the server)")
    sys.stdout.flush()


def gpus_in_words(gpus: Sequence[Sequence[int]]) -> str:
    """`engine 0 on 0 and 1, engine 1 on 2 and 3`."""
    return ", ".join(f"engine {index} on {' and '.join(map(str, each))}" for index, each in enumerate(gpus))


def compute_lines(compute: ComputeFacts) -> list[str]:
    """What computes, on which weights, and how fast; with a remedy if it is numpy."""
    threads = f"{compute.num_threads} thread" + ("s" if compute.num_threads > 1 else "")
    if compute.is_pinned:
        threads += ", kept on " + ("their cores" if compute.num_threads > 1 else "its core")
    weights = weights_in_words(compute)
    if compute.instruction_set:
        kernels = f"{compute.instruction_set}, {compute.kernels}, {threads}"
        weights += f": {compute.token_bytes / 1e6:,.0f} MB a token, read at {compute.read_gb_s:.0f} GB/s"
    else:
        kernels = f"none, numpy computes many times slower: {compute.kernels}"
    return [
        f"Kernels  {kernels}",
        f"Weights  {weights}",
        f"Speed    about {compute.tokens_per_s:,.0f} tokens/s for one stream",
    ]


def gpu_lines(kernels: GpuKernels) -> list[str]:
    """What computes on a GPU, and a line for each thing that would be faster there."""
    by = "Triton, too" if kernels.prompt_attention == "triton" else kernels.prompt_attention
    names = f"cuBLAS and Triton on {kernels.card}; attention of long prompts by {by}"
    return [f"Kernels  {names}", *(f"Faster   {each}" for each in kernels.faster)]


def weights_in_words(compute: ComputeFacts) -> str:
    """`Q4_1 blocks, as in the file`."""
    names = " and ".join(compute.weight_formats)
    if not any(name.startswith("Q") for name in compute.weight_formats):
        return names
    return f"{names} blocks, " + ("made while loading" if compute.is_quantized_here else "as in the file")


def _bold(text: str) -> str:
    return click.style(text, bold=True)


def chat_command(url: str, *, needs_key: bool) -> str:
    """The command to chat with the server at `url`, from another terminal in the same folder."""
    command = f"{program(sys.argv[0])} chat"
    if url != DEFAULT_URL:
        command += f" --url {shlex.quote(url)}"
    return command + (" --api-key KEY" if needs_key else "")


def program(started_as: str) -> str:
    """The command that starts this program: its name if the shell finds it, else the present spelling."""
    found = shutil.which("headwater")
    if os.path.basename(started_as) != "headwater":  # python -m headwater, or from a test
        return f"{shlex.quote(sys.executable)} -m headwater"
    if found is not None and os.path.realpath(found) == os.path.realpath(started_as):
        return "headwater"
    return shlex.quote(started_as)
