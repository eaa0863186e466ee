"""The parts of run.py that several GPUs of one host compute, the most valuable first, and what follows from them."""

from collections.abc import Mapping
from typing import Any

Part = tuple[str, tuple[str, ...], tuple[str, ...], int]  # script, arguments before and after its output, seconds
EIGHT_B, SEVENTY_B = "llama3.1-8b", "llama3.1-70b"
CARDS = (2, 4, 8)


def rank_parts(num_cards: int, *, is_trial: bool = False) -> dict[str, Part]:
    """All parts for a host of `num_cards`. A trial has a tiny model on a CPU, and leaves out what only cards can do."""
    if num_cards not in CARDS:
        raise ValueError(f"--cards must be one of {', '.join(map(str, CARDS))}, found {num_cards}")
    small, large = ("tiny", "tiny") if is_trial else (EIGHT_B, SEVENTY_B)
    place = ("--device", "cpu") if is_trial else ()
    n = str(num_cards)

    def engine(model: str, tp_size: int, parts: str, limit_s: int) -> Part:
        return "engine_run.py", (model,), ("--parts", parts, "--tp-size", str(tp_size), *place), limit_s

    parts: dict[str, Part] = {"equal": ("ranks/ranks_equal.py", (), ("--ranks", n, *place), 150)}
    if not is_trial:
        for ranks in (size for size in CARDS if size <= num_cards):
            parts[f"sums_{ranks}"] = ("all_reduce.py", (), ("--ranks", str(ranks), "--parts", "sums"), 60)
    parts[f"tp{n}_llama"] = engine(small, num_cards, "B2,B3,B4,B1", 130)
    parts["tp1_llama"] = engine(small, 1, "B2,B3,B4,B1", 120)
    # the 70B shape needs two cards at least: the efficiency of its B1 is against these
    parts[f"tp{n}_70b"] = engine(large, num_cards, "B1,B2,B3,B4", 300)
    if num_cards > 2:
        parts["tp2_70b"] = engine(large, 2, "B1,B2,B3", 300)
    for dp_size, tp_size in layouts(num_cards):
        sizes = ("--dp-size", str(dp_size), "--tp-size", str(tp_size))
        parts[f"dp{dp_size}_tp{tp_size}"] = ("ranks/layouts_run.py", (small,), (*sizes, *place), 120)
    for ranks in (size for size in CARDS if size < num_cards):
        parts[f"tp{ranks}_llama"] = engine(small, ranks, "B2,B3,B4,B1", 120)
    if num_cards == 8:
        parts["tp4_70b"] = engine(large, 4, "B1,B2,B3,B4", 300)
    if not is_trial:
        parts[f"tp{n}_profile"] = (
            "profile_run.py", (small,), ("--cases", "one,decode,prefill", "--tp-size", n), 120,
        )  # fmt: skip
        decodes = ("--ranks", n, "--parts", "one_shot", "nccl", "--limit-s", "60")
        parts[f"tp{n}_decodes"] = ("all_reduce.py", (), decodes, 130)
        parts[f"tp{n}_copies"] = ("rank_copies.py", (), ("--ranks", n), 90)
        hits = ("--parts", "hits", "--chats", "32")
        parts[f"tp{n}_tiers"] = ("tiers_run.py", (small,), (*hits, "--tp-size", n), 100)
        parts[f"tp{n}_flush"] = ("flush_run.py", (small,), ("--rounds", "1", "--tp-size", n), 80)
        if num_cards == 2:
            parts["tp1_tiers"] = ("tiers_run.py", (small,), hits, 80)
            parts["tp1_flush"] = ("flush_run.py", (small,), ("--rounds", "1"), 70)
        # last: a server that it leaves behind would keep the cards' memory
        parts[f"tp{n}_check"] = ("check_device.py", ("--ranks", n, "--limit-s", "220", "--report"), (), 240)
    return parts


def layouts(num_cards: int) -> list[tuple[int, int]]:
    """Engines and ranks of each, that use all cards: the middle ones first."""
    found = [(num_cards // size, size) for size in (1, 2, 4, 8) if size <= num_cards]
    return sorted(found, key=lambda it: abs(it[0] - it[1]))


def conclusions(figures: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What the figures of all parts say together, as far as they are there.

    The efficiency of N ranks is the throughput of B1 against N / M times that of the fewest ranks M that were measured.
    """
    found: dict[str, Any] = {}
    for shape in ("llama", "70b"):
        rates = {
            size: max(runs)
            for size in (1, *CARDS)
            if (runs := _runs(figures.get(f"tp{size}_{shape}", {}), "B1_output_tokens_per_s_run"))
        }
        base = min(rates, default=0)
        for size, rate in rates.items():
            if size > base:
                found[f"{shape}_B1_efficiency_tp{size}_over_tp{base}"] = round(rate * base / size / rates[base], 3)
    texts = {name: part["texts"] for name, part in figures.items() if "texts" in part}
    if len(texts) > 1:
        first = next(iter(texts.values()))
        found["layouts_with_equal_texts"] = [name for name, text in texts.items() if text == first]
        found["layouts_compared"] = list(texts)
    return found


def _runs(part: Mapping[str, Any], stem: str) -> list[float]:
    return [value for name, value in part.items() if name.startswith(stem)]
