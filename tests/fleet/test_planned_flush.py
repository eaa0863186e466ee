"""Flushes of a planned fleet: answers are true for the real front, and false ones are found by the same check."""

import logging
import math
from typing import Any

import msgspec
import pytest

from headwater.client.standing import Standing
from headwater.fleet import client as client_module
from headwater.fleet.client import FleetClient
from headwater.fleet.flush_round import Settled
from headwater.fleet.planned.flush_plan import FlushFigures, FlushTrial, play_flushes
from headwater.fleet.planned.stand_in import Steps
from headwater.messages.control import FlushResult

STEPS = Steps(decode_s=0.008, prefill_s=0.05)


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, logger="headwater.fleet")  # a line for each replica that is lost


def played(*, loss: float = 0.01, faults: float = 0.1, num_flushes: int = 4) -> FlushFigures:
    trial = FlushTrial(
        num_replicas=24, steps=STEPS, timeout_s=1.0, loss=loss, faults=faults, num_flushes=num_flushes, seed=0
    )
    return play_flushes(trial)


def test_without_faults_every_flush_is_done_within_a_step() -> None:
    figures = played(loss=0.0, faults=0.0)
    assert figures.statuses == {200: 4} and not any(figures.num_pending)
    assert max(figures.answered_s) < 0.15
    assert figures.num_requests > 500 and figures.num_stale == 0


def test_with_lost_messages_and_ended_processes_nothing_stale_is_served() -> None:
    figures = played()
    assert figures.statuses[202] >= 2 and sum(figures.num_pending) >= 4
    assert max(figures.answered_s) < 2.0  # the timeout and a second
    assert figures.back_s and all(math.isfinite(each) for each in figures.back_s)
    assert figures.num_requests > 500 and figures.num_stale == 0
    assert played() == figures  # a seed repeats a trial


def silence_is_success(flush: Any, answers: dict[int, Any], **_: Any) -> Settled:
    done = next(answer for answer in answers.values() if isinstance(answer, FlushResult))
    return Settled({n: done if isinstance(answer, Exception) else answer for n, answer in answers.items()}, {})


def owes_nothing(standing: Standing, flush: Any) -> None:
    """It serves again as soon as it is reached."""


def test_a_front_that_takes_silence_for_success_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "settle", silence_is_success)
    figures = played()
    assert figures.statuses == {200: 4} and figures.num_stale > 0


def test_a_replica_that_serves_before_the_flush_it_owes_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Standing, "owe", owes_nothing)
    assert played().num_stale > 0


def test_a_new_front_that_takes_replicas_as_they_come_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    take_beat = FleetClient.take_beat

    def as_if_new(front: FleetClient, beat: Any) -> Any:
        return take_beat(front, msgspec.structs.replace(beat, front=""))

    monkeypatch.setattr(FleetClient, "take_beat", as_if_new)
    assert played().num_stale > 0


def test_impossible_trials_are_refused() -> None:
    with pytest.raises(ValueError, match="loss and faults"):
        FlushTrial(num_replicas=1, steps=STEPS, timeout_s=1.0, loss=1.0, faults=0.0, num_flushes=1)
