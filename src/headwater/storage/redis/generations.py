"""Generations in Redis: counters that can be lost with the server's memory, but never decrease.

A killed server may restart with an older snapshot, from before a flush. Only a server with an append-only file
writes a counter to disk before it answers. So each new connection compares the server's run id with the one stored
beside the counters. After a restart without an append-only file, the counters start again at a random number, and
the pages of the snapshot stay unreachable.
"""

import secrets
from collections.abc import Callable, Sequence
from typing import Any

from redis.connection import Connection
from redis.exceptions import ResponseError

from headwater.storage.redis.layout import GENERATIONS, PAGE_PREFIX, SCAN_COUNT, is_out_of_memory

START = b"start"
_SACRIFICE = 16  # pages deleted so that a full server can take a counter
_MAX_SCANS = 100

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
