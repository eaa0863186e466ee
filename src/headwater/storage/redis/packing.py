"""Packs commands for Redis without copying large arguments.

The client's own packers copy every argument, the one in C several times. For pages this costs more than the work of
the server.
"""

_COPIED_BYTES = 6000  # arguments up to this size are joined; larger ones go to the socket separately

Argument = str | int | bytes | memoryview | tuple[bytes | memoryview, ...]


class CommandPacker:
    """Writes commands in RESP (redis.io/docs/reference/protocol-spec), as a connection's `command_packer`.

    An argument may be a tuple of buffers, which is sent as if they were joined.
    """

    def pack(self, *args: Argument) -> list[bytes | memoryview]:
        """The chunks to send, in order. They refer to the caller's buffers."""
        chunks: list[bytes | memoryview] = []
        small = bytearray(b"*%d\r\n" % len(args))
        for arg in args:
            parts = arg if isinstance(arg, tuple) else (_encoded(arg),)
            small += b"$%d\r\n" % sum(len(part) for part in parts)
            for part in parts:
                if len(part) > _COPIED_BYTES:
                    chunks += (bytes(small), part)
                    small.clear()
                else:
                    small += part
            small += b"\r\n"
        chunks.append(bytes(small))
        return chunks


def _encoded(arg: str | int | bytes | memoryview) -> bytes | memoryview:
    match arg:
        case bytes() | memoryview():
            return arg
        case str():
            return arg.encode()
        case int():
            return b"%d" % arg
