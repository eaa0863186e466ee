"""Commands as bytes: one wrong length would make the server read pages as commands."""

from hypothesis import given, settings
from hypothesis import strategies as st

from headwater.storage.redis.packing import CommandPacker

buffers = st.one_of(st.binary(max_size=40), st.integers(5990, 6010).map(lambda size: b"\r\n$*"[:3] * (size // 3)))
arguments = st.one_of(
    buffers,
    buffers.map(memoryview),
    st.text(max_size=10),
    st.integers(-(2**63), 2**63),
    st.lists(buffers, max_size=3).map(tuple),
)


def as_bytes(argument) -> bytes:
    if isinstance(argument, tuple):
        return b"".join(argument)
    if isinstance(argument, bytes | memoryview):
        return bytes(argument)
    return str(argument).encode()


def parse(message: bytes) -> list[bytes]:
    """The arguments of one command, read as a server reads them."""
    head, _, rest = message.partition(b"\r\n")
    found = []
    for _ in range(int(head.removeprefix(b"*"))):
        size, _, rest = rest.partition(b"\r\n")
        length = int(size.removeprefix(b"$"))
        found.append(rest[:length])
        assert rest[length : length + 2] == b"\r\n"
        rest = rest[length + 2 :]
    assert rest == b""
    return found


@settings(deadline=None)
@given(st.lists(arguments, min_size=1, max_size=5))
def test_a_server_reads_what_was_meant(args):
    message = b"".join(CommandPacker().pack(*args))
    assert parse(message) == [as_bytes(argument) for argument in args]


def test_pages_are_sent_from_where_they_lie():
    """A copy of each page would cost more than the rest of the call."""
    page = memoryview(bytearray(10_000))
    chunks = CommandPacker().pack("SET", b"name", (b"header", page))
    assert any(chunk is page for chunk in chunks)
