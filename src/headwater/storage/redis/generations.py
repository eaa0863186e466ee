"""Generations in Redis: counters that can be lost with the server's memory, but never decrease.

A killed server may restart with an older snapshot, from before a flush. Only a server with an append-only file has
written the counter by then. So each new connection compares the server's run id with the one stored beside the
counters. After a restart without an append-only file, the counters start again at a random number, and the pages of
the snapshot stay unreachable.

Even with an append-only file a server may answer first and write up to two seconds later (`appendfsync everysec`,
while the disk is slow). So a raised counter is acknowledged when the server has nothing left to write.
"""

import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any

from redis.connection import Connection
from redis.exceptions import ResponseError

from headwater.storage.errors import StorageUnavailable
from headwater.storage.redis.layout import GENERATIONS, PAGE_PREFIX, SCAN_COUNT, is_out_of_memory

START = b"start"
_SACRIFICE = 16  # pages deleted so that a full server can take a counter
_MAX_SCANS = 100
_LOOK_AGAIN_S = 0.01

Execute = Callable[..., Any]

# ARGV: run id, whether an append-only file is on, a random start
_ADOPT = b"""
local known = redis.call('HMGET', KEYS[1], 'start', 'run', 'aof')
if known[1] and known[2] == ARGV[1] then return 0 end
if known[1] and known[3] == '1' and ARGV[2] == '1' then
  redis.call('HSET', KEYS[1], 'run', ARGV[1])
  return 1
end
redis.call('DEL', KEYS[1])
redis.call('HSET', KEYS[1], 'start', ARGV[3], 'run', ARGV[1], 'aof', ARGV[2])
return 2
"""

# ARGV: scope id
_RAISE = b"""
local start = redis.call('HGET', KEYS[1], 'start')
if not start then return false end
return {start, redis.call('HINCRBY', KEYS[1], ARGV[1], 1)}
"""


def adopt_server(connection: Connection) -> None:
    """Set up a new connection, and ensure that the counters belong to this run of the server."""

    def execute(*args: Any) -> Any:
        connection.send_command(*args)
        return connection.read_response()

    connection.on_connect()
    facts = _parse_info(execute("INFO", "server")) | _parse_info(execute("INFO", "persistence"))
    has_log = facts.get(b"aof_enabled", b"0")
    start = secrets.randbits(62)
    _write(execute, "EVAL", _ADOPT, 1, GENERATIONS, facts[b"run_id"], has_log, start)


def raise_counter(execute: Execute, scope_id: bytes) -> int | None:
    """Increment a counter and return it; None if the store has lost its counters."""
    raised = _write(execute, "EVAL", _RAISE, 1, GENERATIONS, scope_id)
    return None if raised is None else int(raised[0]) + int(raised[1])


def wait_until_logged(execute: Execute, *, limit_s: float) -> None:
    """Wait until the append-only file, if there is one, has all that was executed before.

    The file then survives a crash of the server. Raises StorageUnavailable after `limit_s` seconds.
    """
    give_up_s = time.monotonic() + limit_s
    while _unlogged_bytes(execute):
        if time.monotonic() >= give_up_s:
            raise StorageUnavailable(f"redis: the append-only file has not taken a raised counter within {limit_s} s")
        time.sleep(_LOOK_AGAIN_S)


def _unlogged_bytes(execute: Execute) -> int:
    """Bytes that wait for the append-only file; 0 without such a file."""
    return int(execute("INFO", "persistence").get("aof_buffer_length", 0))


def counters_of(values: Sequence[bytes | None]) -> tuple[int, ...] | None:
    """The counters in the answer to HMGET start, scope, scope, ...; None if the store has lost them."""
    if values[0] is None:
        return None
    start = int(values[0])
    return tuple(start + int(raised or 0) for raised in values[1:])


def _parse_info(answer: bytes) -> dict[bytes, bytes]:
    lines = (line.partition(b":") for line in answer.splitlines() if b":" in line)
    return {name: value for name, _, value in lines}


def _write(execute: Execute, *args: Any) -> Any:
    """Run a command. If the server has no memory for it, delete some of our pages and try again.

    Otherwise a flush could fail because of the very pages that it covers.
    """
    try:
        return execute(*args)
    except ResponseError as error:
        if not is_out_of_memory(error):
            raise
    _delete_some_pages(execute)
    return execute(*args)


def _delete_some_pages(execute: Execute) -> None:
    cursor, left = b"0", _SACRIFICE
    for _ in range(_MAX_SCANS):
        cursor, names = execute("SCAN", cursor, "MATCH", PAGE_PREFIX + b"*", "COUNT", SCAN_COUNT)
        if names:
            execute("UNLINK", *names[:left])
            left -= len(names[:left])
        if left == 0 or int(cursor) == 0:
            return
