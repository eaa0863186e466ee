"""One line of the doctor's report."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class Level(Enum):
    OK = "ok"
    NOTE = "note"  # worth knowing; the server works
    PROBLEM = "problem"  # the server does not work, or many times slower than it could


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found about one subject. `remedy` is what the user can do; `facts` are the same for programs."""

    subject: str
    text: str
    level: Level = Level.OK
    remedy: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
