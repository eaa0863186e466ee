"""Answers by grammars from the default model on a CPU: they match, whatever runs beside them."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq
from llguidance import LLMatcher

from headwater.engine.loop import EngineLoop
from headwater.launch.assembly import build_engine
from headwater.launch.config import ServerArgs
from headwater.launch.default_model import ensure_default_model
from headwater.messages.base import pack_ids
from headwater.messages.generation import Generate, Grammar, LogprobParams, Output, Outputs, SamplingParams
from headwater.messages.wire import decode_to_client, encode
from headwater.tokenization.tokenizer import Tokenizer

pytestmark = pytest.mark.slow
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "kind": {"enum": ["cat", "dog"]},
        "ages": {"type": "array", "items": {"type": "integer", "maximum": 99}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "kind", "ages"],
    "additionalProperties": False,
}
JSON_TEXT = LLMatcher.grammar_from_json_schema(SCHEMA, overrides={"whitespace_flexible": False})
DATE_TEXT = LLMatcher.grammar_from_regex(r"(19|20)[0-9]{2}-[01][0-9]-[0-3][0-9]")


class Bench:
    """An engine's loop in this thread, and its client."""

    def __init__(self, folder: Path) -> None:
        model = ensure_default_model(progress=False)
        self.tokenizer = Tokenizer.load(model)
        endpoint = f"ipc://{folder}/engine"
        args = ServerArgs(model=str(model), device="cpu", threads=2, max_total_tokens=192, max_running_requests=8)
        self.loop: EngineLoop = build_engine(args, endpoint)
        self.socket = zmq.Context.instance().socket(zmq.DEALER)
        self.socket.connect(endpoint)
        self.outputs: dict[str, list[Output]] = {}

    def ask(self, rid: str, prompt: str, *, grammar: Grammar | None = None, logprobs: bool = False, **sampling) -> None:
        params = SamplingParams(**{"max_new_tokens": 100, "temperature": 0.0, **sampling})
        ids = pack_ids(self.tokenizer.encode(prompt))
        wanted = LogprobParams() if logprobs else None
        self.outputs[rid] = []
        self.socket.send(encode(Generate(rid, ids, params, grammar=grammar, logprobs=wanted)))

    def run(self) -> dict[str, str]:
        """Turn until all are answered; returns their texts."""
        for _ in range(5000):
            self.loop.turn()
            while self.socket.poll(0):
                message = decode_to_client(self.socket.recv())
                for output in message.items if isinstance(message, Outputs) else ():
                    self.outputs[output.rid].append(output)
            if all(outputs and outputs[-1].finish for outputs in self.outputs.values()):
                return {rid: self.text(rid) for rid in self.outputs}
        raise AssertionError("the requests do not end")

    def text(self, rid: str) -> str:
        return self.tokenizer.decode(self.tokens(rid))

    def tokens(self, rid: str) -> list[int]:
        return [token for output in self.outputs[rid] for token in output.token_ids]

    def finish(self, rid: str):
        return self.outputs[rid][-1].finish


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.loop.stop()
    bench.loop.run()
    bench.socket.close(linger=0)


def test_answers_match_their_grammars_and_harm_no_other(bench: Bench) -> None:
    """Greedy and drawn rows, with and without grammars, in fewer pages than they need, so some are retracted."""
    prompts = {f"p{number}": "Tell me about an animal. " * (number + 2) for number in range(3)}
    for rid, prompt in prompts.items():
        bench.ask(rid, prompt, max_new_tokens=48, ignore_eos=True)
    bench.ask("first", "Today is ", grammar=Grammar(DATE_TEXT))  # reads the vocabulary: later ones do not wait for it
    alone = {rid: bench.run()[rid] for rid in prompts}
    bench.outputs.clear()
    for rid, prompt in prompts.items():
        bench.ask(rid, prompt, max_new_tokens=48, ignore_eos=True)
    for seed in range(3):
        bench.ask(f"drawn{seed}", "A pet as JSON:", grammar=Grammar(JSON_TEXT), temperature=1.5, seed=seed)
    bench.ask("greedy", "A pet as JSON:", grammar=Grammar(JSON_TEXT), frequency_penalty=0.4, logprobs=True)
    bench.ask("forced", "Today is ", grammar=Grammar(DATE_TEXT), ignore_eos=True, min_new_tokens=60)
    texts = bench.run()
    assert {rid: texts[rid] for rid in prompts} == alone
    for rid in ("drawn0", "drawn1", "drawn2", "greedy"):
        pet = json.loads(texts[rid].removesuffix("<|im_end|>"))
        assert set(pet) == {"name", "kind", "ages"} and pet["kind"] in ("cat", "dog") and pet["ages"], texts[rid]
        assert bench.finish(rid).type == "stop"
    assert len({texts[f"drawn{seed}"] for seed in range(3)}) > 1
    assert sum(len(output.logprobs or ()) for output in bench.outputs["greedy"]) == len(bench.tokens("greedy"))
    assert re.fullmatch(r"(19|20)\d\d-[01]\d-[0-3]\d", texts["forced"]) and bench.finish("forced").type == "stop"
    retracted = sum(outputs[-1].meta.num_retractions for outputs in bench.outputs.values() if outputs[-1].meta)
    assert retracted > 0, "the test needs a smaller cache"


def test_a_grammar_begins_after_its_marker(bench: Bench) -> None:
    """As after thinking. The bias makes the marker certain at some time, since this model does not think."""
    marker = tuple(bench.tokenizer.encode(" done", add_special_tokens=False))
    bias = dict.fromkeys(marker, 12.0)
    grammar = Grammar(DATE_TEXT, begins_after=marker)
    bench.ask("a", "Think, then say a date.", grammar=grammar, logit_bias=bias, temperature=1.0)
    text = bench.run()["a"]
    assert re.fullmatch(r".*? done(19|20)\d\d-[01]\d-[0-3]\d(<\|im_end\|>)?", text, flags=re.DOTALL), text


def test_what_is_no_grammar_is_a_400(bench: Bench) -> None:
    bench.ask("a", "Hello", grammar=Grammar("start: nothing"))
    bench.run()
    assert (bench.finish("a").status, bench.finish("a").err_type) == (400, "invalid_request_error")
    assert "nothing" in bench.finish("a").message
