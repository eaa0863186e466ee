"""The file of `headwater fleet up --models`: a list of models, or a mapping with it under `models`."""

from pathlib import Path
from typing import Any

import yaml


def read_models_file(path: Path) -> list[Any]:
    """The list, as `read_models` takes it. ValueError if the file holds none."""
    try:
        found = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--models {path}: {error}") from None
    listed = found.get("models") if isinstance(found, dict) and set(found) == {"models"} else found
    if not isinstance(listed, list):
        raise ValueError(f"--models {path}: must be a list of models")
    return listed
