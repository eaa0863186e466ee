"""The log has one line for each operation: what an operator asks after a night of flushes."""

import logging
from typing import Any

import pytest

from engine_driver import Driver
from headwater.messages.cache import GetPins
from headwater.messages.control import CancelOperation, ContinueGeneration, FlushCache, PauseGeneration


@pytest.fixture
def driver(caplog: pytest.LogCaptureFixture) -> Driver:
    caplog.set_level(logging.INFO, logger="headwater.operation")
    return Driver(num_pages=64)


def lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [record.fields for record in caplog.records if record.message == "operation"]  # type: ignore[attr-defined]


def send(driver: Driver, message: Any) -> None:
    driver.send(message)
    driver.turn()


def test_a_flush_has_its_outcome(driver: Driver, caplog: pytest.LogCaptureFixture) -> None:
    driver.finish(driver.generate("warm", list(range(40)), 1))
    driver.settle()
    send(driver, FlushCache(call_id="a", mode="now"))
    (line,) = lines(caplog)
    assert (line["kind"], line["mode"], line["status"], line["success"]) == ("flush_cache", "now", 200, True)
    assert line["freed_pages"] == {"device": driver.replies["a"].freed["device"].pages}
    assert line["generation"] == 1


def test_an_expired_flush_names_what_it_waited_for(driver: Driver, caplog: pytest.LogCaptureFixture) -> None:
    driver.generate("running", list(range(40)), 100)
    driver.turn(3)
    send(driver, FlushCache(call_id="a", timeout_s=2.0))
    assert lines(caplog) == []
    driver.clock.advance(2.0)
    driver.turn()
    (line,) = lines(caplog)
    assert (line["status"], line["blockers"], line["operation_id"]) == (400, {"running": 1}, "op-1")
    assert line["waited_s"] == pytest.approx(2.0, abs=0.5)


def test_a_cancelled_operation_has_a_line(driver: Driver, caplog: pytest.LogCaptureFixture) -> None:
    driver.generate("running", list(range(40)), 100)
    driver.turn(3)
    send(driver, FlushCache(call_id="a", timeout_s=60))
    send(driver, CancelOperation(call_id="b", started_by_call="a"))
    (line,) = lines(caplog)
    assert line["success"] is False
    assert "cancelled" in line["answer"]


def test_operations_at_once_have_a_line_and_what_only_reads_has_none(
    driver: Driver, caplog: pytest.LogCaptureFixture
) -> None:
    send(driver, PauseGeneration(call_id="a", mode="in_place"))
    send(driver, ContinueGeneration(call_id="b"))
    send(driver, GetPins(call_id="c"))
    assert [line["kind"] for line in lines(caplog)] == ["pause_generation", "continue_generation"]
