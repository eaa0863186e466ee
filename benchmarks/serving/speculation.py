#!/usr/bin/env python3
"""What drafts bring on a CPU: tokens a second with and without speculation, in turns, and that texts are the same.

    speculation.py [--save] [--rounds 5] [--tokens 160] [--threads 2] [--model PATH] [--case summary --case rows16 ...]

One process holds an engine for each algorithm. In each round every engine answers the same requests, in an order that
alternates; the others wait meanwhile. Texts that repeat: a summary, code with a name changed, and a conversation about
the model's own answers. `rows16` and `rows64` are that many different requests at once, of the same kinds, and
`prose64` stories, which repeat little. `again` asks the same questions twice, as one does for several samples or after
a lost connection; the second time counts. Ratios are medians over the rounds, of tokens per second of wall time; steps
do not depend on what else the machine does.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from headwater import Engine
from headwater.launch.default_model import ensure_default_model
from results import save

ALGORITHMS = ("none", "ngram", "tree")
TOWNS = (
    "Lisbon", "Bergen", "Trieste", "Gdansk", "Bilbao", "Varna", "Galway", "Izmir", "Tartu", "Split", "Ghent", "Turku",
    "Malmo", "Brno", "Porto", "Lviv",
)  # fmt: skip
GOODS = ("salt", "timber", "wool", "glass", "copper", "olive oil")


def document(number: int) -> str:
    """A report of about 250 tokens, unlike those of other numbers."""
    town, other = TOWNS[number % 16], TOWNS[(number * 7 + 3) % 16]
    lines = [
        f"In {1890 + number * 3 + it} the harbour of {town} shipped {140 + 17 * it + number} tons of {GOODS[it]} to "
        f"{other}, and the harbour master wrote that the price of {GOODS[it]} had risen to {12 + it} crowns."
        for it in range(6)
    ]
    return " ".join(lines)


def code(number: int) -> str:
    """A function of about 150 tokens."""
    name = f"total_of_{GOODS[number % 6].replace(' ', '_')}_{number}"
    return (
        f"def {name}(shipments, year):\n    total = 0\n    for shipment in shipments:\n"
        f"        if shipment.year != year:\n            continue\n        if shipment.weight < {number + 2}:\n"
        "            raise ValueError('the weight is too small')\n        total = total + shipment.weight\n"
        "    if total == 0:\n        raise ValueError('nothing was shipped in this year')\n    return total\n"
    )


def chat(*turns: str) -> str:
    """The prompt of a conversation in the default model's template; the last turn is the user's."""
    roles = ("user", "assistant")
    parts = [f"<|im_start|>{roles[number % 2]}\n{text}<|im_end|>\n" for number, text in enumerate(turns)]
    return "".join(parts) + "<|im_start|>assistant\n"


def summary(number: int) -> str:
    """An example, then the task: small models repeat better what they have seen repeated."""
    first = document(number + 40).split(". ")[0]
    return chat(
        f"Repeat the report word for word:\n\n{first}.",
        f"{first}.",
        f"Repeat the report word for word:\n\n{document(number)}",
    )


def edit(number: int) -> str:
    """An example, then the task."""
    task = "Write this code again, with the variable total renamed to amount:\n\n"
    example = code(number + 3)
    return chat(task + example, example.replace("total ", "amount "), task + code(number))


def story(number: int) -> str:
    return chat(
        f"Write a story about a sailor from {TOWNS[number % 16]} who sells {GOODS[number % 6]}, in {number} parts."
    )


class Run:
    """One engine's answers to a case."""

    def __init__(self, engine: Engine, num_tokens: int) -> None:
        self._engine = engine
        self._num_tokens = num_tokens
        self.texts: list[list[int]] = []
        self.seconds = self.cpu_seconds = 0.0
        self._counters = self._engine.get_state().counters

    def ask(self, prompts: list[str]) -> list[str]:
        """All prompts at once."""
        sampling = {"temperature": 0, "max_new_tokens": self._num_tokens, "ignore_eos": True}
        began_s, began_cpu_s = time.perf_counter(), time.process_time()
        answers = self._engine.generate(prompts, sampling)
        self.seconds += time.perf_counter() - began_s
        self.cpu_seconds += time.process_time() - began_cpu_s
        self.texts += [answer["output_ids"] for answer in answers]
        return [answer["text"] for answer in answers]

    def forget(self) -> None:
        """What follows counts, and nothing before."""
        self.texts, self.seconds, self.cpu_seconds = [], 0.0, 0.0
        self._counters = self._engine.get_state().counters

    def figures(self) -> dict[str, float]:
        after = self._engine.get_state().counters
        steps, drafted, accepted = (
            after[name] - self._counters[name]
            for name in ("spec_verify_steps", "spec_draft_tokens", "spec_accepted_tokens")
        )
        num_tokens = sum(map(len, self.texts))
        return {
            "tokens_per_s": num_tokens / self.seconds,
            "cpu_ms_per_token": self.cpu_seconds / num_tokens * 1e3,
            "drafted": drafted,
            "accept_rate": accepted / drafted if drafted else 0.0,
            "accept_length": 1 + accepted / steps if steps else 1.0,
            "saved_steps": accepted / num_tokens,
        }


def conversation(run: Run, seed: int) -> None:
    """Three turns: the model works on its own answer."""
    turns = [f"List six facts about the harbour of {TOWNS[seed % 16]}, one a line."]
    for request in ("Correct the spelling of your list and write it again.", "Write the whole list once more."):
        turns += [run.ask([chat(*turns)])[0], request]
    run.ask([chat(*turns)])


def mixture(count: int) -> list[str]:
    return [(summary, edit)[number % 2](number) for number in range(count)]


def again(run: Run, seed: int) -> None:
    prompts = [story(seed * 4 + number) for number in range(2)]
    for number, prompt in enumerate((*prompts, *prompts)):
        if number == len(prompts):
            run.forget()
        run.ask([prompt])


CASES: dict[str, Callable[[Run, int], Any]] = {
    "summary": lambda run, seed: run.ask([summary(seed)]),
    "edit": lambda run, seed: run.ask([edit(seed)]),
    "turns": conversation,
    "story": lambda run, seed: run.ask([story(seed)]),
    "again": again,
    "rows16": lambda run, seed: run.ask(mixture(16)),
    "rows64": lambda run, seed: run.ask(mixture(64)),
    "prose64": lambda run, seed: run.ask([story(number) for number in range(64)]),
}


def measure(engines: dict[str, Engine], case: str, seed: int, options: argparse.Namespace) -> dict[str, dict]:
    """One round: every engine answers, with an empty cache. SystemExit if their texts differ."""
    names = list(engines) if seed % 2 else list(engines)[::-1]
    found, texts = {}, {}
    for name in names:
        engines[name].flush_cache(mode="now")
        run = Run(engines[name], options.tokens)
        CASES[case](run, seed)
        found[name], texts[name] = run.figures(), run.texts
    if any(other != texts["none"] for other in texts.values()):
        sys.exit(f"{case}, round {seed}: the texts differ")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="keep the figures in benchmarks/results")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=160)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model")
    parser.add_argument("--case", action="append", choices=CASES, help="only these; may be repeated")
    options = parser.parse_args()
    model = options.model or str(ensure_default_model())
    engines = {
        name: Engine(model, device="cpu", threads=options.threads, speculative_algorithm=name) for name in ALGORITHMS
    }
    records = []
    for case in options.case or CASES:
        measure(engines, case, 0, options)
        rounds = [measure(engines, case, seed, options) for seed in range(1, options.rounds + 1)]
        ratios = {
            name: statistics.median(it[name]["tokens_per_s"] / it["none"]["tokens_per_s"] for it in rounds)
            for name in ALGORITHMS[1:]
        }
        records.append({"case": case, "ratios": ratios, "rounds": rounds})
        for name in ALGORITHMS:
            median = {figure: statistics.median(it[name][figure] for it in rounds) for figure in rounds[0][name]}
            shown = ", ".join(f"{figure} {value:.3g}" for figure, value in median.items())
            print(f"{case:8} {name:6} {ratios.get(name, 1.0):.2f} times: {shown}", flush=True)
    if options.save:
        print(save("speculation", records, servers={}))
    for engine in engines.values():
        engine.shutdown()


if __name__ == "__main__":
    main()
