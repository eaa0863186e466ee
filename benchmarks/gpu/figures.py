"""Figures of a run: printed and written as they come, so that a run that is cut short has kept what it had."""

import json
from pathlib import Path
from typing import Any


class Figures:
    """A JSON file of names and numbers."""

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        self._path = path
        self.values: dict[str, Any] = dict(facts)

    def put(self, name: str, value: Any) -> None:
        self.values[name] = round(value, 4) if isinstance(value, float) else value
        print(f"{name} = {self.values[name]}", flush=True)
        self._path.write_text(json.dumps(self.values, indent=1) + "\n")
