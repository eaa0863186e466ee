"""Which names a request body may have: a field that changes the answer is honoured or refused, never ignored.

Unknown names are ignored, since gateways add their own, unless they look like a misspelt name. In `sampling_params`
they are refused. docs/api.md lists the refused names.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

from headwater.generation.field_table import IGNORED, REFUSED, Refused

UNKNOWN = "unknown_parameter"
_MISSPELT = 0.85  # difflib's ratio: one letter wrong in seven or so
_MAX_NAME_CHARS = 64  # longer names are not compared
_MAX_UNKNOWN = 32  # names of one body that are compared


@dataclass(frozen=True, slots=True)
class Names:
    """The rules of one body for fields that its schema does not declare."""

    refused: Mapping[str, Refused] = field(default_factory=dict)
    other_names: Mapping[str, str] = field(default_factory=dict)  # a name of another API -> what is meant here
    defaults: Mapping[str, Any] = field(default_factory=dict)  # of names in `other_names`: values that are accepted
    ignored: Mapping[str, str] = field(default_factory=dict)  # beside `IGNORED`: why an answer is the same without it
    refuses_unknown: bool = False


class Body(BaseModel):
    """A request body. A null counts as left out; `names` has the rules for undeclared fields."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())
    names: ClassVar[Names] = Names()

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        given = {name: value for name, value in values.items() if value is not None}
        check_names(given, cls.model_fields, cls.names)
        return given


def check_names(given: Mapping[str, Any], honoured: Collection[str], names: Names) -> None:
    """Raises PydanticCustomError for the first name that is refused; `given` holds no nulls."""
    num_unknown = 0
    for name, value in given.items():
        if name in honoured:
            continue
        if (refused := names.refused.get(name)) is not None:
            _refuse(name, value, refused)
        elif name in names.other_names:
            if not _is_empty(value) and value != names.defaults.get(name):
                raise _error(name, f"not known here; did you mean {names.other_names[name]}?", code=UNKNOWN)
        elif not (name in names.ignored or name in IGNORED or name in REFUSED):
            num_unknown += 1
            if num_unknown <= _MAX_UNKNOWN or names.refuses_unknown:
                _check_unknown(name, honoured, names)


def _check_unknown(name: str, honoured: Collection[str], names: Names) -> None:
    if (meant := likely_meant(name, [*honoured, *names.refused])) is not None:
        raise _error(name, f"not known; did you mean {meant}?", code=UNKNOWN)
    if names.refuses_unknown:
        raise _error(name, f"not known; known are {', '.join(honoured)}", code=UNKNOWN)


def likely_meant(name: str, known: Iterable[str]) -> str | None:
    """The known name that `name` probably misspells."""
    if len(name) > _MAX_NAME_CHARS:
        return None
    return next(iter(get_close_matches(name, list(known), n=1, cutoff=_MISSPELT)), None)


def _refuse(name: str, value: Any, refused: Refused) -> None:
    if value in refused.neutral or (refused.is_empty_neutral and _is_empty(value)):
        return
    raise _error(name, f"not supported: {refused.why}", code="unsupported_parameter")


def _is_empty(value: Any) -> bool:
    """Whether a value asks for nothing: null, false, an empty string or collection, or a list of these."""
    if isinstance(value, list):
        return all(_is_empty(item) for item in value)
    return value is None or value is False or value in ("", {})


def _error(name: str, message: str, *, code: str) -> PydanticCustomError:
    name = name.encode("utf-8", "backslashreplace").decode()[:_MAX_NAME_CHARS]  # lone surrogates are invalid in JSON
    return PydanticCustomError("request_field", "{message}", {"message": message, "param": name, "code": code})
