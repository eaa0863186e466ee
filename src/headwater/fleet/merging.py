"""One answer from those of several models to the same call. No sockets.

An answer names the models: `models` has the whole answer of each, and the entries of lists have a `model`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from headwater.generation.answer_fields import Json

METRICS = "/metrics"
_LISTS = {"/v1/models": "data", "/api/tags": "models", "/api/ps": "models"}  # whose entries have names of their own
REPORTS = frozenset({METRICS, "/fleet", *_LISTS})  # of the models that answer; the others are left out
_ENTRIES = ("engines", "replicas", "loads", "pins")  # lists with one entry for each replica, or several
_SUMS_BY_TIER = ("freed", "retired")
_HELP = "# HELP "


@dataclass(frozen=True, slots=True)
class Taken:
    """A whole answer of the front of one model."""

    status: int
    headers: Sequence[tuple[bytes, bytes]]
    body: bytes

    @property
    def facts(self) -> Any:
        """The JSON of the body; None if it is no JSON."""
        try:
            return msgspec.json.decode(self.body)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return None


def merged(path: str, answers: Mapping[str, Taken]) -> Taken:
    """The answer over all models: success means that all of them did it. `answers` holds at least one, by model."""
    status = max(answer.status for answer in answers.values())
    first = next(iter(answers.values()))
    if status >= 400 and all((each.status, each.body) == (status, first.body) for each in answers.values()):
        return first  # a key that is missing, for example
    if path in REPORTS:
        found = {name: answer for name, answer in answers.items() if answer.status < 400}
        if not found:
            return next(answer for answer in answers.values() if answer.status == status)
        answers, status = found, max(answer.status for answer in found.values())
    if path == METRICS:
        pages = [answer.body.decode() for answer in answers.values()]
        return Taken(status, first.headers, merged_metrics(pages).encode())
    facts = {name: answer.facts for name, answer in answers.items()}
    if (key := _LISTS.get(path)) is not None:
        entries = [entry for each in facts.values() for entry in each[key]]
        return _json(status, next(iter(facts.values())) | {key: entries})
    if all(isinstance(each, list) for each in facts.values()):
        return _json(status, [{"model": name} | entry for name, each in facts.items() for entry in each])
    if all(isinstance(each, dict) or not answers[name].body for name, each in facts.items()):
        return _json(status, _merged_facts({name: each or {} for name, each in facts.items()}, answers))
    return Taken(status, [(b"content-type", b"text/plain; charset=utf-8")], _merged_texts(answers))


def _json(status: int, facts: Any) -> Taken:
    return Taken(status, [(b"content-type", b"application/json")], msgspec.json.encode(facts))


def _merged_facts(facts: Mapping[str, Json], answers: Mapping[str, Taken]) -> Json:
    """What concerns all models at the top, as an answer of one model has it."""
    found: Json = {}
    if any("success" in each for each in facts.values()):
        found["success"] = all(each.get("success", answers[name].status < 300) for name, each in facts.items())
    words = {name: _message(each) for name, each in facts.items()}
    if any(words.values()):
        found["message"] = " ".join(f"{name}: {text}" for name, text in words.items() if text)
    for key in {key: None for each in facts.values() for key in each if key.startswith("num_")}:
        found[key] = sum(each.get(key, 0) for each in facts.values())
    for key in _SUMS_BY_TIER:
        if any(key in each for each in facts.values()):
            found[key] = _summed(each.get(key, {}) for each in facts.values())
    for key in _ENTRIES:
        lists = {name: each[key] for name, each in facts.items() if isinstance(each.get(key), list)}
        if lists:
            found[key] = [{"model": name} | entry for name, entries in lists.items() for entry in entries]
    worst = max(answers, key=lambda name: answers[name].status)
    if "error" in facts[worst]:
        found["error"] = facts[worst]["error"] | {"message": f"{worst}: {_message(facts[worst])}"}
    return found | {"models": dict(facts)}


def _message(facts: Json) -> str:
    error = facts.get("error")
    found = error.get("message") if isinstance(error, dict) else facts.get("message")
    return found if isinstance(found, str) else ""


def _summed(amounts: Any) -> Json:
    total: Json = {}
    for by_tier in amounts:
        for tier, amount in by_tier.items():
            entry = total.setdefault(tier, dict.fromkeys(amount, 0))
            for name, number in amount.items():
                entry[name] += number
    return total


def _merged_texts(answers: Mapping[str, Taken]) -> bytes:
    """A line for each model; what was refused comes first, since scripts look at the first words for a success."""
    worst_first = sorted(answers.items(), key=lambda item: -item[1].status)
    return "".join(f"{answer.body.decode().strip()} ({name})\n" for name, answer in worst_first).encode()


def merged_metrics(pages: Sequence[str]) -> str:
    """Prometheus text of several servers as one page. Their series differ in `model_name`.

    The samples of a family have to stand together, under one `# HELP`.
    """
    families: dict[str, tuple[list[str], list[str]]] = {}  # by the line of its help: lines about it, samples
    for page in pages:
        about, samples = families.setdefault("", ([], []))
        for line in page.splitlines():
            if line.startswith(_HELP):
                about, samples = families.setdefault(line, ([], []))
            if not line.startswith("#"):
                samples.append(line)
            elif line not in about:
                about.append(line)
    return "".join(f"{line}\n" for about, samples in families.values() for line in (*about, *samples))
