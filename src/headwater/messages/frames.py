"""Messages in a pipe between a process and its parent: four bytes of length, little-endian, then msgpack."""

from io import RawIOBase

import msgspec


def pack_frame(message: msgspec.Struct) -> bytes:
    body = msgspec.msgpack.encode(message)
    return len(body).to_bytes(4, "little") + body


def read_frame(stream: RawIOBase) -> bytes:
    """The body of the next frame. Raises `EOFError` if the pipe ends before it is whole."""
    return read_exactly(stream, int.from_bytes(read_exactly(stream, 4), "little"))


def read_exactly(stream: RawIOBase, num_bytes: int) -> bytes:
    """Read `num_bytes` from a pipe, which may return them in several portions. Raises `EOFError`."""
    data = b""
    while len(data) < num_bytes:
        portion = stream.read(num_bytes - len(data))
        if not portion:
            raise EOFError("the parent process ended before it sent the arguments")
        data += portion
    return data


class FrameReader:
    """Cuts what a pipe delivers, in portions of any size, into the bodies of frames."""

    def __init__(self) -> None:
        self._data = b""

    def feed(self, portion: bytes) -> list[bytes]:
        """The frames that are complete with `portion`."""
        self._data += portion
        bodies = []
        while len(self._data) >= 4:
            end = 4 + int.from_bytes(self._data[:4], "little")
            if len(self._data) < end:
                break
            bodies.append(self._data[4:end])
            self._data = self._data[end:]
        return bodies
