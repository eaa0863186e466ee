"""A server that has no descriptors left says so in one line and goes on."""

import asyncio
import errno
import logging

import pytest

from headwater.http_api import http_server
from headwater.http_api.http_server import AcceptErrors


def told(error: Exception, *, times: int = 1, **context: object) -> None:
    async def tell() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(handler)
        for _ in range(times):
            loop.call_exception_handler({"message": "something failed", "exception": error} | context)

    handler = AcceptErrors()
    asyncio.run(tell())


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE])
def test_thousands_of_failed_accepts_are_one_line(number: int, caplog: pytest.LogCaptureFixture) -> None:
    told(OSError(number, "Too many open files"), times=5000, socket=object())
    (record,) = caplog.records
    assert record.exc_info is None
    assert "cannot accept connections" in record.getMessage()


def test_it_says_so_again_after_a_while(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "COMPLAIN_EVERY_S", 0.0)
    told(OSError(errno.EMFILE, "Too many open files"), times=3, socket=object())
    assert len(caplog.records) == 3


@pytest.mark.parametrize(
    ("error", "context"),
    [(ValueError("a bug"), {}), (OSError(errno.EMFILE, "elsewhere"), {}), (OSError(errno.EIO, "x"), {"socket": 1})],
)
def test_every_other_error_keeps_its_traceback(error, context, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        told(error, **context)
    (record,) = caplog.records
    assert record.name == "asyncio"
    assert record.exc_info
