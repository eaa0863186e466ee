#!/usr/bin/env python3
"""What grammars cost on the CPU: decode steps with a grammar in all, half or none of the rows, and the first token.

    grammar.py [--save] [--rows 16] [--tokens 96] [--rounds 6] [--threads 2] [--model PATH]

One process holds the engine, without HTTP. The cases take turns in every round. Figures of a step are medians over the
rounds of the mean step of a batch; `cpu_ms` is the CPU time of all threads, which also counts on a busy machine. Times
to the first token alternate between requests without a grammar and requests with a schema that was never seen.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import zmq
from llguidance import LLMatcher

sys.path.append(str(Path(__file__).resolve().parent / "serving"))
from headwater.engine.loop import EngineLoop
from headwater.launch.assembly import build_engine
from headwater.launch.config import ServerArgs
from headwater.launch.default_model import ensure_default_model
from headwater.messages.base import pack_ids
from headwater.messages.generation import Generate, GenerateBatch, Grammar, Outputs, SamplingParams
from headwater.messages.wire import decode_to_client, encode
from results import save

NUM_PROMPT_TOKENS = 32
NUM_FIRST_TOKENS = 30  # pairs of requests


def grammar(number: int) -> Grammar:
    """A schema of 2 KB, unlike those of other numbers, that no answer of a few hundred tokens completes."""
    text = {"type": "string", "minLength": 20, "description": f"what was said in case {number}"}
    count = {"type": "array", "items": {"type": "number"}, "minItems": 8, "maxItems": 20}
    kinds = [text, count, {"enum": [f"kind_{number}_{it}" for it in range(6)]}]
    properties = {f"field_{number}_{it}": kinds[it % 3] for it in range(24)}
    schema = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    assert 1500 < len(json.dumps(schema)) < 3000
    return Grammar(text=LLMatcher.grammar_from_json_schema(schema))


class Client:
    """Sends requests to an engine's loop, and turns it until they are answered."""

    def __init__(self, loop: EngineLoop, endpoint: str) -> None:
        self._loop = loop
        self._socket = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.connect(endpoint)
        self._num_sent = 0

    def run(self, num_rows: int, num_tokens: int, grammars: list[Grammar | None]) -> tuple[list[float], list[float]]:
        """Wall time and CPU time of the process after each turn, from the sending on."""
        rids = []
        items = []
        for row in range(num_rows):
            self._num_sent += 1
            ids = [(self._num_sent * 7919 + 31 * it) % 40_000 + 100 for it in range(NUM_PROMPT_TOKENS)]
            sampling = SamplingParams(max_new_tokens=num_tokens, temperature=0.0, ignore_eos=True)
            rids.append(f"r{self._num_sent}")
            items.append(
                Generate(rid=rids[-1], prompt_ids=pack_ids(ids), sampling=sampling, grammar=grammars[row])
            )
        wall_s, cpu_s = [time.perf_counter()], [time.process_time()]
        self._socket.send(encode(GenerateBatch(items=tuple(items))))
        open_rids = set(rids)
        while open_rids:
            self._loop.turn()
            has_tokens = False
            while self._socket.poll(0):
                message = decode_to_client(self._socket.recv())
                for output in message.items if isinstance(message, Outputs) else ():
                    has_tokens |= bool(output.token_ids)
                    if output.finish is not None:
                        assert output.finish.type == "length", output.finish
                        open_rids.discard(output.rid)
            if has_tokens:
                wall_s.append(time.perf_counter())
                cpu_s.append(time.process_time())
        return wall_s, cpu_s


def steps_ms(client: Client, options: argparse.Namespace, *, share: float) -> dict[str, float]:
    """The mean decode step of a batch in which this share of the rows has a grammar."""
    grammars = [grammar(row % 4) if row < share * options.rows else None for row in range(options.rows)]
    wall_s, cpu_s = client.run(options.rows, options.tokens, grammars)
    num_steps = len(wall_s) - 3  # after the second tokens
    return {"wall_ms": (wall_s[-1] - wall_s[2]) / num_steps * 1e3, "cpu_ms": (cpu_s[-1] - cpu_s[2]) / num_steps * 1e3}


def first_tokens_ms(client: Client) -> dict[str, float]:
    """Milliseconds to the first token without a grammar, with a fresh one, and with one that is compiled already."""
    found: dict[str, list[float]] = {"none": [], "fresh": [], "compiled": []}
    for number in range(NUM_FIRST_TOKENS):
        for name, one in (("none", None), ("fresh", grammar(1000 + number)), ("compiled", grammar(0))):
            wall_s, _ = client.run(1, 2, [one])
            found[name].append((wall_s[1] - wall_s[0]) * 1e3)
    return {name: statistics.median(times) for name, times in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="keep the figures in benchmarks/results")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model")
    options = parser.parse_args()
    model = options.model or str(ensure_default_model())
    with tempfile.TemporaryDirectory() as folder:
        endpoint = f"ipc://{folder}/engine"
        args = ServerArgs(model=model, device="cpu", threads=options.threads, max_running_requests=options.rows)
        client = Client(build_engine(args, endpoint), endpoint)
        began_s = time.perf_counter()
        client.run(1, 2, [grammar(0)])
        vocabulary_s = time.perf_counter() - began_s
        rounds = [
            {name: steps_ms(client, options, share=share) for name, share in (("none", 0), ("half", 0.5), ("all", 1))}
            for _ in range(options.rounds)
        ]
        first_ms = first_tokens_ms(client)
    medians = {
        name: {kind: statistics.median(it[name][kind] for it in rounds) for kind in ("wall_ms", "cpu_ms")}
        for name in ("none", "half", "all")
    }
    for name, step in medians.items():
        shown = (f"{kind} {step[kind]:.2f} ({step[kind] / medians['none'][kind] - 1:+.1%})" for kind in step)
        print(f"step, grammars in {name} rows: {', '.join(shown)}")
    print("first token, ms:", {name: round(ms, 2) for name, ms in first_ms.items()})
    print(f"first grammar of the engine, which reads the vocabulary: {vocabulary_s:.2f} s")
    if options.save:
        record = {"rows": options.rows, "steps": medians, "first_token_ms": first_ms, "first_grammar_s": vocabulary_s}
        print(save("grammar", [record | {"rounds": rounds}], servers={}))


if __name__ == "__main__":
    main()
