"""Read JSON objects of a body that its schema leaves open. Every fault is a 400 that names the place."""

import json
from collections.abc import Collection, Mapping
from typing import Any

from headwater.generation.answer_fields import Json
from headwater.generation.errors import InvalidRequest, bad_request, unsupported
from headwater.generation.validation import check_unicode

_EMPTY = (None, False, "", [], {})


class JsonObject:
    """One object and its place in the body, such as `messages[0].content[1]`. A null member counts as left out."""

    def __init__(self, value: Any, where: str) -> None:
        if not isinstance(value, Mapping):
            raise bad_request(where, f"{where}: must be an object")
        self.where = where
        self._members = {name: member for name, member in value.items() if member is not None}

    def place(self, name: str) -> str:
        """The place of a member."""
        return f"{self.where}.{name}"

    def fault(self, name: str, problem: str) -> InvalidRequest:
        """The 400 for a member."""
        return bad_request(self.place(name), f"{self.place(name)}: {problem}")

    def kind(self, known: Collection[str], *, default: str | None = None, why: str = "this server takes text") -> str:
        """The member `type`. A type that is not among `known` is refused."""
        kind = self._members.get("type", default)
        if kind in (known if isinstance(kind, str) else ()):
            return kind
        place = self.place("type")
        raise unsupported(place, f"{place}: {kind!r} is not supported: {why}; supported: {', '.join(known)}")

    def text(self, name: str, *, default: str | None = None) -> str:
        """A string. Without a default it must be given."""
        value = self._members.get(name, default)
        if not isinstance(value, str):
            raise self.fault(name, "must be a string")
        try:
            return check_unicode(value)
        except ValueError as error:
            raise self.fault(name, str(error)) from None

    def flag(self, name: str) -> bool:
        """A boolean, by default false."""
        value = self._members.get(name, False)
        if not isinstance(value, bool):
            raise self.fault(name, "must be true or false")
        return value

    def number(self, name: str) -> int:
        """An integer that must be given."""
        value = self._members.get(name)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.fault(name, "must be an integer")
        return value

    def get(self, name: str) -> Any:
        """A member of any type; None if it is left out."""
        return self._members.get(name)

    def plain(self, name: str, *, default: Json | None = None) -> Json:
        """An object that is passed on as it is, such as a JSON schema."""
        value = self._members.get(name, default)
        if not isinstance(value, dict):
            raise self.fault(name, "must be an object")
        return value

    def objects(self, name: str) -> list["JsonObject"]:
        """A list of objects; empty if it is left out."""
        return json_objects(self._members.get(name, []), self.place(name))

    def refuse(self, name: str, why: str) -> None:
        """Refuses a member that asks for something."""
        if self._members.get(name) not in _EMPTY:
            raise unsupported(self.place(name), f"{self.place(name)}: not supported: {why}")

    def json(self, name: str) -> str:
        """The text of an object."""
        return json.dumps(self.plain(name, default={}), ensure_ascii=False)


def json_objects(value: Any, where: str) -> list[JsonObject]:
    """The objects of a list."""
    if not isinstance(value, list):
        raise bad_request(where, f"{where}: must be a list of objects")
    return [JsonObject(item, f"{where}[{index}]") for index, item in enumerate(value)]
