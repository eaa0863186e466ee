"""A reader of pickles that knows data and a table of names, and calls nothing.

Python's own unpickler calls what a payload names. This one interprets the opcodes that tensors need
(https://github.com/python/cpython/blob/main/Lib/pickletools.py describes them). A global is looked up in a table of our
own builders, and a name that is not in the table ends the reading before anything is built from it.
"""

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

MAX_OPCODES = 2_000_000
MAX_DEPTH = 64  # of marks: lists in lists
_MAX_MEMO = 1_000_000
_MAX_NAME_BYTES = 256


class PickleRefused(ValueError):
    """A payload that is not what a trainer sends, in words for its sender."""


@dataclass(frozen=True, slots=True)
class Builder:
    """What a global of the table stands for. `build` gets the arguments of a call; None: it is not called."""

    name: str
    build: Callable[..., Any] | None = None
    has_state: bool = False  # a class whose objects are a name and a state


@dataclass(slots=True)
class Instance:
    """An object of a class of the table, with the state that the payload gave it."""

    name: str
    state: dict[str, Any]


Table = Mapping[str, Builder]
FindStorage = Callable[[Any], Any]


class Machine:
    """Reads one pickle from `data`. `position` is behind it afterwards."""

    def __init__(self, data: memoryview, table: Table, *, find_storage: FindStorage | None = None) -> None:
        """`find_storage`: of a torch.save file, the storage with a persistent id."""
        self._data = data
        self._table = table
        self._find_storage = find_storage
        self.position = 0
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def load(self) -> Any:
        """The value of the pickle. PickleRefused for everything that is not in its small language."""
        try:
            return self._run()
        except PickleRefused as error:
            raise PickleRefused(f"{error} (at byte {self.position})") from None
        except (IndexError, TypeError, ValueError, KeyError, OverflowError, AttributeError, struct.error) as error:
            raise PickleRefused(f"damaged: {type(error).__name__} (at byte {self.position})") from None

    def _run(self) -> Any:
        for _ in range(MAX_OPCODES):
            code = self._take(1)[0]
            if code == _STOP:
                if len(self._stack) != 1 or self._marks:
                    raise PickleRefused("damaged: it does not end with one value")
                return self._stack.pop()
            step = _OPCODES.get(code)
            if step is None:
                raise PickleRefused(f"opcode 0x{code:02x} is not allowed")
            step(self)
        raise PickleRefused(f"more than {MAX_OPCODES} opcodes")

    # --- reading ----------------------------------------------------------------------------------

    def _take(self, count: int) -> memoryview:
        end = self.position + count
        if count < 0 or end > len(self._data):
            raise PickleRefused(f"cut off: {count} bytes are announced, {len(self._data) - self.position} are left")
        piece = self._data[self.position : end]
        self.position = end
        return piece

    def _number(self, form: str) -> int:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _line(self) -> str:
        limit = min(len(self._data), self.position + _MAX_NAME_BYTES)
        text = bytes(self._data[self.position : limit]).partition(b"\n")
        if not text[1]:
            raise PickleRefused("a name is too long")
        self.position += len(text[0]) + 1
        return text[0].decode()

    def _text(self, form: str) -> None:
        self._push(bytes(self._take(self._number(form))).decode())

    def _bytes(self, form: str) -> None:
        self._push(self._take(self._number(form)))

    # --- the stack --------------------------------------------------------------------------------

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop(self) -> Any:
        if len(self._stack) <= (self._marks[-1] if self._marks else 0):
            raise PickleRefused("damaged: the stack is empty")
        return self._stack.pop()

    def _top(self) -> Any:
        value = self._pop()
        self._stack.append(value)
        return value

    def _mark(self) -> None:
        if len(self._marks) >= MAX_DEPTH:
            raise PickleRefused(f"nested deeper than {MAX_DEPTH} levels")
        self._marks.append(len(self._stack))

    def _pop_to_mark(self) -> list[Any]:
        if not self._marks:
            raise PickleRefused("damaged: no mark")
        start = self._marks.pop()
        items = self._stack[start:]
        del self._stack[start:]
        return items

    def _tuple(self, count: int) -> None:
        items = [self._pop() for _ in range(count)]
        self._push(tuple(reversed(items)))

    # --- the memo ---------------------------------------------------------------------------------

    def _put(self, index: int) -> None:
        if len(self._memo) >= _MAX_MEMO:
            raise PickleRefused(f"a memo of more than {_MAX_MEMO} values")
        self._memo[index] = self._top()

    def _get(self, index: int) -> None:
        if index not in self._memo:
            raise PickleRefused(f"damaged: nothing is remembered as {index}")
        self._push(self._memo[index])

    # --- containers -------------------------------------------------------------------------------

    def _append(self, items: list[Any]) -> None:
        into = self._top()
        if type(into) is not list:
            raise PickleRefused("only lists are appended to")
        into.extend(items)

    def _set_items(self, items: list[Any]) -> None:
        into = self._top()
        if type(into) is not dict or len(items) % 2:
            raise PickleRefused("only dicts have items")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str | int):
                raise PickleRefused("a key must be a text or a number")
            into[key] = value

    # --- names ------------------------------------------------------------------------------------

    def _global(self, module: Any, name: Any) -> None:
        if not (isinstance(module, str) and isinstance(name, str)):
            raise PickleRefused("damaged: a name is no text")
        found = self._table.get(f"{module}.{name}")
        if found is None:
            raise PickleRefused(f"{module[:100]}.{name[:100]} is not allowed")
        self._push(found)

    def _reduce(self) -> None:
        arguments, called = self._pop(), self._pop()
        if not isinstance(called, Builder) or called.build is None or type(arguments) is not tuple:
            raise PickleRefused("what is called is no constructor of a tensor")
        self._push(called.build(*arguments))

    def _new(self) -> None:
        arguments, kind = self._pop(), self._pop()
        if not isinstance(kind, Builder) or not kind.has_state or arguments != ():
            raise PickleRefused("an object of this kind is not allowed")
        self._push(Instance(kind.name, {}))

    def _build(self) -> None:
        state, instance = self._pop(), self._top()
        if not isinstance(instance, Instance) or type(state) is not dict or instance.state:
            raise PickleRefused("the state of this object is not allowed")
        instance.state = {str(key): value for key, value in state.items()}

    def _persistent(self) -> None:
        if self._find_storage is None:
            raise PickleRefused("persistent ids are not allowed")
        self._push(self._find_storage(self._pop()))

    def _stack_global(self) -> None:
        name, module = self._pop(), self._pop()
        self._global(module, name)

    def _set_item(self) -> None:
        value, key = self._pop(), self._pop()
        self._set_items([key, value])

    def _mark_global(self) -> None:
        module = self._line()
        self._global(module, self._line())

    def _long(self) -> None:
        piece = self._take(self._number("<B"))
        self._push(int.from_bytes(piece, "little", signed=True))


def _protocol(machine: Machine) -> None:
    number = machine._number("<B")
    if not 2 <= number <= 5:
        raise PickleRefused(f"protocol {number} is not read, only 2 to 5")


_STOP = ord(".")
_OPCODES: dict[int, Callable[[Machine], Any]] = {
    0x80: _protocol,
    0x95: lambda m: m._take(8),  # a frame: the reader needs none
    ord("("): Machine._mark,
    ord("0"): Machine._pop,
    ord("N"): lambda m: m._push(None),
    0x88: lambda m: m._push(True),
    0x89: lambda m: m._push(False),
    ord("K"): lambda m: m._push(m._number("<B")),
    ord("M"): lambda m: m._push(m._number("<H")),
    ord("J"): lambda m: m._push(m._number("<i")),
    0x8A: Machine._long,
    ord("G"): lambda m: m._push(m._number(">d")),
    0x8C: lambda m: m._text("<B"),
    ord("X"): lambda m: m._text("<I"),
    0x8D: lambda m: m._text("<Q"),
    ord("C"): lambda m: m._bytes("<B"),
    ord("B"): lambda m: m._bytes("<I"),
    0x8E: lambda m: m._bytes("<Q"),
    0x96: lambda m: m._bytes("<Q"),
    ord(")"): lambda m: m._push(()),
    ord("t"): lambda m: m._push(tuple(m._pop_to_mark())),
    0x85: lambda m: m._tuple(1),
    0x86: lambda m: m._tuple(2),
    0x87: lambda m: m._tuple(3),
    ord("]"): lambda m: m._push([]),
    ord("a"): lambda m: m._append([m._pop()]),
    ord("e"): lambda m: m._append(m._pop_to_mark()),
    ord("}"): lambda m: m._push({}),
    ord("s"): Machine._set_item,
    ord("u"): lambda m: m._set_items(m._pop_to_mark()),
    0x94: lambda m: m._put(len(m._memo)),
    ord("q"): lambda m: m._put(m._number("<B")),
    ord("r"): lambda m: m._put(m._number("<I")),
    ord("h"): lambda m: m._get(m._number("<B")),
    ord("j"): lambda m: m._get(m._number("<I")),
    ord("c"): Machine._mark_global,
    0x93: Machine._stack_global,
    ord("R"): Machine._reduce,
    0x81: Machine._new,
    ord("b"): Machine._build,
    ord("Q"): Machine._persistent,
}
