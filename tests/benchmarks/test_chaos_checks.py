"""The checks of benchmarks/chaos.py notice what they are there for, and nothing else."""

import asyncio
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
from chaos_parts.aftermath import _not_free
from chaos_parts.cases import Answer, Case, make_cases
from chaos_parts.clients import Client, _lines
from chaos_parts.outcome import Outcome
from chaos_parts.weights_log import WeightsLog, checkpoint_of

CASE = Case(kind="generate", prompt="what of bread?", num_tokens=3)
CHAT = Case(kind="chat", prompt="what of bread?", num_tokens=3)
RIGHT = {"first": Answer(text="warm", ids=(1, 2, 3)), "second": Answer(text="cold", ids=(4, 5, 6))}


def judged(answer: Answer, *, case: Case = CASE, weights: WeightsLog | None = None) -> Outcome:
    """What a client says of an answer to a question that it has just asked."""
    outcome = Outcome()
    expected = {name: {CASE: right, CHAT: right} for name, right in RIGHT.items()}
    weights = weights or WeightsLog("first-0")
    client = Client(httpx.AsyncClient(), number=0, seed=0, expected=expected, weights=weights, outcome=outcome)
    client._judge(case, answer, way="whole", started_s=1e12)
    return outcome


def whole(text: str = "warm", ids: tuple[int, ...] | None = (1, 2, 3), label: str = "first-0", **more: Any) -> Answer:
    return Answer(text=text, ids=ids, label=label, finish="length", **more)


def test_the_right_answer_is_right() -> None:
    outcome = judged(whole())
    assert (outcome.failures, outcome.requests) == ([], {"complete": 1})


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (whole(text="cold", ids=(4, 5, 6)), "wrong text"),
        (whole(ids=(1, 2, 4)), "wrong text"),
        (whole(text="war"), "wrong text"),
        (whole(label="first-1"), "stale policy"),
        (Answer(text="warm", label="first-0"), "no finish reason"),
        (Answer(text="wa", ids=(1,), label="first-0", finish="abort"), None),
        (Answer(text="co", ids=(4,), label="first-0", finish="abort"), "wrong text"),
        (Answer(error="internal error", status=500), "wrong status"),
        (Answer(error="engine 1 is gone", status=503), None),
        (Answer(text="wa", error="engine 1 is gone", status=200, label="first-0"), None),
        (Answer(text="co", error="engine 1 is gone", status=200, label="first-0"), "wrong text"),
        (Answer(error="the request was aborted", status=499), None),
        (Answer(error="max_tokens must be positive", status=400), "wrong status"),
    ],
)
def test_what_is_wrong_is_noticed(answer: Answer, kind: str | None) -> None:
    assert list(judged(answer).kinds()) == ([] if kind is None else [kind])


def test_an_answer_under_two_weights_has_no_one_text() -> None:
    weights = WeightsLog("first-0")
    weights.begin("second-1")
    mixed = whole(text="wald", ids=(1, 5, 6), label="second-1", spans=(("first-0", 0), ("second-1", 1)))
    assert judged(mixed, weights=weights).failures == []
    assert judged(whole(text="wald", ids=None), case=CHAT, weights=weights).failures == [], "chats tell no spans"
    assert judged(whole(text="wald", ids=(1, 5, 6)), weights=weights).kinds() == {"wrong text": 1}
    cut = Answer(text="wal", ids=(1, 5), label="first-0", error="engine 1 is gone")  # the last chunk never came
    assert judged(cut, weights=weights).failures == []
    assert judged(cut).kinds() == {"wrong text": 1}


def test_the_log_knows_what_was_in_force() -> None:
    log = WeightsLog("first-0")
    before = log.begin("second-1")
    assert log.now == {"first-0", "second-1"}
    log.end(before=before, target="second-1", is_done=True)
    assert log.now == {"second-1"}
    before = log.begin("first-2")
    log.end(before=before, target="first-2", is_done=False)
    assert log.now == {"second-1"}, "refused: nothing has changed"
    before = log.begin("first-3")
    log.end(before=before, target="first-3", is_done=None)
    assert log.now == {"second-1", "first-3"}, "nobody knows until the next one"
    assert log.possible(0.0, 1e12) == {"first-0", "second-1", "first-2", "first-3"}
    assert log.possible(1e12, 1e12) == log.now
    assert checkpoint_of("first-3") == "first"


def test_pages_that_are_not_free_are_found() -> None:
    page = (
        'headwater_page_capacity{model_name="m",dp_rank="0",tier="device"} 8.0\n'
        'headwater_pages{model_name="m",dp_rank="0",tier="device",owner="free"} %s\n'
        'headwater_pages{model_name="m",dp_rank="0",tier="device",owner="retired"} %s\n'
    )
    assert _not_free(page % (8.0, 0.0)) == []
    assert _not_free(page % (7.0, 1.0)) == [{"engine": "0", "tier": "device", "free": 7, "retired": 1, "capacity": 8}]
    assert _not_free("") != [], "no pages told is not all pages free"


def test_lines_of_a_stream_end_at_newlines_alone() -> None:
    """Tokens may hold any separator of Unicode; a client that splits there breaks the JSON."""
    async def read() -> list[bytes]:
        parts = "data: a\u2028b\u0085c\n\nda".encode(), b"ta: d\n"
        response = httpx.Response(200, content=_given(parts))
        return [line async for line in _lines(response)]

    assert asyncio.run(read()) == ["data: a\u2028b\u0085c".encode(), b"", b"data: d"]


async def _given(parts: tuple[bytes, ...]) -> Any:
    for part in parts:
        yield part


def test_the_cases_are_those_of_the_seed_and_of_all_kinds() -> None:
    cases = make_cases(1, num_cases=9, max_tokens=8)
    assert cases == make_cases(1, num_cases=9, max_tokens=8) != make_cases(2, num_cases=9, max_tokens=8)
    assert {case.kind for case in cases} == {"generate", "completion", "chat"}
