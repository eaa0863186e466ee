"""What keeps an engine from being idle, in words for people. Imports nothing, since shell commands use it."""

from collections.abc import Mapping

WORDS = {  # one, several
    "running": ("running request", "running requests"),
    "loading": ("request that loads its pages", "requests that load their pages"),
    "queued": ("queued request", "queued requests"),
    "grammar": ("request whose grammar is being compiled", "requests whose grammars are being compiled"),
    "offload": ("copy to host memory", "copies to host memory"),
    "restore": ("copy from host memory", "copies from host memory"),
    "persist": ("write to the store", "writes to the store"),
    "prefetch": ("read from the store", "reads from the store"),
    "weight_update": ("weight update", "weight updates"),
    "requests_holding_old_pages": ("request that still holds old pages", "requests that still hold old pages"),
}


def blockers_in_words(blockers: Mapping[str, int]) -> str:
    """`{"running": 2}` → `2 running requests`; "" for none."""
    return ", ".join(f"{count} {_words(name, count)}" for name, count in sorted(blockers.items()))


def _words(name: str, count: int) -> str:
    one, several = WORDS.get(name, (name.replace("_", " "),) * 2)
    return one if count == 1 else several
