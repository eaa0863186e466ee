"""What `headwater serve` says: a command that can be typed as it stands, and signs of life while it starts."""

import logging
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from msgspec.structs import replace

from headwater.devices.cpu.kernel_library import REMEDY
from headwater.messages.state import ComputeFacts, GpuKernels
from headwater.server import banner
from headwater.server.address import own_url
from headwater.server.banner import chat_command, compute_lines, gpu_lines, gpus_in_words, program
from headwater.server.signs_of_life import SignsOfLife, process_age_s


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A program called headwater that nobody's PATH leads to."""
    path = tmp_path / "some folder" / "headwater"
    path.parent.mkdir()
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def test_a_program_that_is_not_on_the_path_is_named_as_it_was_started(
    installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`headwater chat` is "command not found" for everybody who followed the README."""
    monkeypatch.setenv("PATH", "/nowhere")
    assert program(".venv/bin/headwater") == ".venv/bin/headwater"
    assert program(str(installed)) == f"'{installed}'", "quoted for the shell"


def test_a_program_on_the_path_is_named_by_its_name(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(installed.parent))
    assert program(str(installed)) == "headwater"


def test_another_program_of_that_name_on_the_path_is_not_meant(
    installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "headwater"
    shutil.copy(installed, other)
    monkeypatch.setenv("PATH", str(installed.parent))
    assert program(str(other)) == str(other)


def test_started_as_a_module(monkeypatch: pytest.MonkeyPatch) -> None:
    words = program("/x/headwater/__main__.py").split()
    assert words == [sys.executable, "-m", "headwater"]


def test_the_address_is_told_where_it_is_not_the_usual_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(banner, "program", lambda _: "headwater")
    assert chat_command("http://127.0.0.1:30000", needs_key=False) == "headwater chat"
    assert chat_command("http://[::1]:80", needs_key=False) == "headwater chat --url 'http://[::1]:80'"
    assert chat_command("http://127.0.0.1:30000", needs_key=True) == "headwater chat --api-key KEY"


@pytest.mark.parametrize(("host", "shown"), [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1")])
def test_the_address_is_one_that_a_client_can_use(host: str, shown: str) -> None:
    with socket.create_server((host, 0)) as listener:
        assert own_url(listener) == f"http://{shown}:{listener.getsockname()[1]}"


def test_a_long_start_says_that_it_lives(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), SignsOfLife(every_s=0.01) as signs:
        while len(caplog.messages) < 2:
            time.sleep(0.01)
        signs.stop()
        num_said = len(caplog.messages)
        time.sleep(0.05)
        assert len(caplog.messages) == num_said, "nothing after the banner"
    assert "still starting" in caplog.messages[0]


def test_the_age_counts_from_the_start_of_the_process_and_not_of_the_import() -> None:
    """Imports are the larger part of what a person waits for."""
    code = "import time; time.sleep(0.3); from headwater.server.signs_of_life import process_age_s as age; print(age())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    can_tell = os.path.exists("/proc/self/stat")
    assert float(done.stdout) >= (0.3 if can_tell else 0.0)
    assert process_age_s() > 0


COMPUTE = ComputeFacts(
    instruction_set="avx2",
    kernels="shipped",
    num_threads=2,
    is_pinned=False,
    weight_formats=("Q4_1", "Q8_0"),
    is_quantized_here=False,
    token_bytes=96_000_000,
    read_gb_s=26.6,
    decode_s=0.007,
)


def test_the_banner_says_what_computes_and_how_fast() -> None:
    """It called a model that is served in the bits of its file `bfloat16 on cpu`."""
    assert compute_lines(COMPUTE) == [
        "Kernels  avx2, shipped, 2 threads",
        "Weights  Q4_1 and Q8_0 blocks, as in the file: 96 MB a token, read at 27 GB/s",
        "Speed    about 125 tokens/s for one stream",
    ]


def test_the_banner_without_kernels_says_so_and_names_the_remedy() -> None:
    kernels, weights, _ = compute_lines(
        replace(COMPUTE, instruction_set="", kernels=REMEDY, weight_formats=("float32",), num_threads=1)
    )
    assert kernels == (
        "Kernels  none, numpy computes many times slower: install a C compiler, or `pip install ziglang`"
    )
    assert len(kernels) <= 98
    assert weights == "Weights  float32"


def test_the_banner_tells_blocks_of_the_file_from_those_made_here() -> None:
    assert "blocks, made while loading" in compute_lines(replace(COMPUTE, is_quantized_here=True))[1]
    assert "2 threads, kept on their cores" in compute_lines(replace(COMPUTE, is_pinned=True))[0]


@pytest.mark.parametrize("num_bytes", [10**6, 16 * 10**9])
def test_the_banner_fits_a_terminal(num_bytes: int) -> None:
    longest = replace(COMPUTE, instruction_set="avx512_bf16", kernels="compiled here", num_threads=64, is_pinned=True)
    lines = compute_lines(replace(longest, token_bytes=num_bytes, weight_formats=("Q4_K", "Q6_K", "bfloat16")))
    assert max(map(len, lines)) <= 98


def test_a_gpu_names_its_attention_and_what_would_be_faster() -> None:
    """Without fa3 a long prompt takes longer, and nothing said so."""
    assert gpu_lines(GpuKernels("NVIDIA H200", "fa3")) == [
        "Kernels  cuBLAS and Triton on NVIDIA H200; attention of long prompts by fa3"
    ]
    own = GpuKernels("NVIDIA H200", "triton", ("fa3 for long prompts, which needs the package fa3-fwd",))
    assert gpu_lines(own) == [
        "Kernels  cuBLAS and Triton on NVIDIA H200; attention of long prompts by Triton, too",
        "Faster   fa3 for long prompts, which needs the package fa3-fwd",
    ]


def test_gpus_are_shown_by_engine() -> None:
    assert gpus_in_words([(0, 1), (2, 3)]) == "engine 0 on 0 and 1, engine 1 on 2 and 3"
