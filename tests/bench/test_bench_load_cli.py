"""`headwater bench` from the command line, against servers that stream by script."""

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner
from scripted_streams import scripted_streams

from headwater.bench.exchange import Watched
from headwater.cli.bench.progress import progress_line
from headwater.cli.main import app

SMALL = ("--requests", "6", "--concurrency", "2", "--user-tokens", "9", "--output-tokens", "4", "--warm-up", "2")


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["bench", *arguments], env={"NO_COLOR": "1", "COLUMNS": "110"})


def test_a_round_with_goals_a_page_and_a_record(tmp_path: Path) -> None:
    page, record = tmp_path / "r.html", tmp_path / "r.json"
    with scripted_streams(token_s=0.001, num_cached=3) as script:
        files = ("--html", str(page), "--json", str(record))
        done = run("--url", script.url, *SMALL, "--slo", "ttft=60000,itl=60000", *files)
        assert done.exit_code == 0, done.output
        bodies = script.bodies("/v1/chat/completions")
    assert len(bodies) == 2 + 2 + 6, "two to learn the length of words, two to warm up"
    assert bodies[-1]["max_tokens"] == 4
    assert bodies[-1]["ignore_eos"] is True
    assert "6 requests of 9 + 4 tokens; closed loop, 2 at a time" in done.output
    assert "cold: device, host, storage" in done.output
    assert "6 of 6 requests met" in done.output
    assert re.search(r"TTFT ms +[\d.,]+ +[\d.,]+", done.output)
    assert re.search(r"load generator: \d+ µs of CPU a token", done.output)
    figures = json.loads(record.read_text())
    (only,) = figures["rounds"]
    assert (only["figures"]["num_output_tokens"], len(only["requests"])) == (24, 6)
    assert only["flush"]["words"] == "cold: device, host, storage"
    text = page.read_text()
    drawings = [part.split("</svg>")[0] for part in text.split("<svg")[1:]]
    assert len(drawings) == 4
    for drawing in drawings:
        assert len(ElementTree.fromstring(f"<svg{drawing}</svg>")) > 4
    assert not re.search(r"(src|href)=|https?:|<script", text), "nothing from elsewhere"


def test_two_servers_are_compared() -> None:
    with scripted_streams() as first, scripted_streams(flush_status=404) as second:
        done = run("--url", first.url, "--against", second.url, *SMALL, "--rounds", "2")
        assert done.exit_code == 0, done.output
    rounds = re.findall(r"^(127\S+), round (\d)", done.output, re.MULTILINE)
    one, two = (url.partition("://")[2] for url in (first.url, second.url))
    assert rounds == [(one, "1"), (two, "1"), (one, "2"), (two, "2")]
    assert "cannot be flushed: it answers /flush_cache with 404" in done.output
    assert re.search(r"TTFT p50 +[\d.,]+ +[\d.,]+ +[\d.,]+", done.output.split("ratio")[1])


@pytest.mark.parametrize("api", ["chat", "completions", "generate"])
def test_a_mooncake_trace_is_replayed(tmp_path: Path, api: str) -> None:
    trace = tmp_path / "trace.jsonl"
    lines = [
        {"timestamp": 50 * index, "input_length": 700, "output_length": 2, "hash_ids": [1, index]} for index in range(3)
    ]
    trace.write_text("\n".join(map(json.dumps, lines)))
    path = {"chat": "/v1/chat/completions", "completions": "/v1/completions", "generate": "/generate"}[api]
    with scripted_streams() as script:
        done = run("--url", script.url, "--api", api, "--trace", str(trace), "--trace-speed", "2", "--warm-up", "0")
        assert done.exit_code == 0, done.output
        *_, first, second, third = script.bodies(path)
    assert "3 requests of trace.jsonl, 2 times faster; at the times of the trace" in done.output
    name = {"chat": "messages", "completions": "prompt", "generate": "text"}[api]
    texts = [body[name][0]["content"] if api == "chat" else body[name] for body in (first, second, third)]
    words = [text.split() for text in texts]
    assert [len(each) for each in words] == [700] * 3
    assert words[0][:512] == words[1][:512] == words[2][:512], "the block of the same hash"
    assert words[0][512:] != words[1][512:]


def test_prompts_of_ids_arrive_by_poisson() -> None:
    with scripted_streams() as script:
        arguments = ("--api", "generate", "--prompts", "ids", "--vocab-size", "400", "--rate", "500", "--warm-up", "0")
        done = run("--url", script.url, *arguments, "--requests", "5", "--user-tokens", "30")
        assert done.exit_code == 0, done.output
        assert [len(body["input_ids"]) for body in script.bodies("/generate")] == [30] * 5
    assert "Poisson, 500 a second" in done.output


def test_failed_requests_end_with_1_and_say_why() -> None:
    with scripted_streams(error_after=2) as script:
        done = run("--url", script.url, "--prompts", "ids", "--api", "completions", *SMALL[:-1], "0")
    assert done.exit_code == 1
    assert "failed 6 times: the engine ended" in done.output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--requests", "0"), "--requests must be an integer from 1 to"),
        (("--rate", "0"), "--rate must be a number from"),
        (("--slo", "ttft"), "ttft needs milliseconds above 0"),
        (("--flush", "disk"), "'disk' is not one of device, host, storage, none"),
        (("--rate", "1", "--trace", "x"), "--rate and --trace exclude each other"),
        (("--trace", "/no/such/file"), "trace: "),
        (("--against-model", "m"), "need --against"),
        (("--prompts", "ids"), "prompts of token ids need --api completions or generate"),
        (("--url", "nowhere"), "is not an address like"),
        (("--html", "/no/such/folder/x.html"), "/no/such/folder is no folder"),
    ],
)
def test_a_wrong_option_of_the_load_is_a_sentence(arguments: tuple[str, ...], says: str) -> None:
    done = run(*arguments)
    assert done.exit_code == 2
    assert says in " ".join(done.output.split())
    assert "Traceback" not in done.output


def test_no_server_is_one_line() -> None:
    done = run("--url", "http://127.0.0.1:9", *SMALL)
    assert done.exit_code == 1
    assert "no server answers at http://127.0.0.1:9" in done.output
    assert "Traceback" not in done.output


def test_the_line_of_progress() -> None:
    watched = Watched()
    watched.num_done, watched.num_running, watched.num_failed = 3, 2, 1
    line = progress_line("host:1, round 1", watched, 6, seconds=4.2, tokens_per_s=1234.5)
    assert line == "host:1, round 1 [############............] 3/6, 2 running, 1 failed, 1,234 tokens/s, 4 s"
