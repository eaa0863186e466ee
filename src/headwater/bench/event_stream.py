"""Server-sent events out of pieces of a body, however the network cut them."""

from collections.abc import Callable


class EventSplitter:
    """Collects pieces; `feed` returns the data of the events that are complete."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, piece: bytes) -> list[bytes]:
        """The `data` of each complete event. Comments, names and ids are left out."""
        text = self._rest + piece
        if b"\r" in text:
            text = text.replace(b"\r\n", b"\n")
        *blocks, self._rest = text.split(b"\n\n")
        found = []
        for block in blocks:
            if block.startswith(b"data: ") and b"\n" not in block:
                found.append(block[6:])
            elif data := _data_of(block):
                found.append(data)
        return found


def _data_of(block: bytes) -> bytes:
    lines = [line[5:].removeprefix(b" ") for line in block.split(b"\n") if line.startswith(b"data:")]
    return b"\n".join(lines)


class EventTimes:
    """When each JSON event of one answer came, and the last of them. `take` is for `HttpClient.request`."""

    def __init__(self, on_event: Callable[[float], None]) -> None:
        """`on_event` gets the moment of each (`time.perf_counter`)."""
        self._on_event = on_event
        self._splitter = EventSplitter()
        self.last = b"{}"

    def take(self, piece: bytes, now_s: float) -> None:
        for event in self._splitter.feed(piece):
            if event.startswith(b"{"):
                self.last = event
                self._on_event(now_s)
