#!/usr/bin/env python3
"""How often fewer bits choose another token than float32 does, on the default model and on every instruction set.

    cpu_accuracy.py [--tokens 5000] [--isa avx2 ...] [--forms bfloat16 int8 ...] [--transformers] [--out RECORD.json]

The model reads given texts: prose, a licence, Python and C of this repository. At every position its most probable next
token is compared. The form `float32` has the values of the file without its blocks. The forms `int8` and `int4` put
those values in blocks, as `--quantization` does. The form `file` is the file's own blocks. `--transformers` compares
float32 with transformers as well. A form takes about 10 s of a core for 5,000 tokens and an instruction set.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from headwater.devices.cpu.device import CpuDevice
from headwater.devices.cpu.kernel_build import usable_instruction_sets
from headwater.devices.cpu.program import StepArrays
from headwater.devices.host_tensor import HostTensor
from headwater.devices.kv_memory import KVLayout
from headwater.execution.cpu_runner import RecordedModel
from headwater.launch.default_model import ensure_default_model
from headwater.models.decoder import DecoderModel
from headwater.models.gguf_file import GGUFFile
from headwater.models.reading.build_decoder import build_decoder
from headwater.models.weights import PlacedWeights, WeightForm
from headwater.models.weights_gguf import GGUFWeights, read_gguf_config
from headwater.tokenization.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
TEXTS = ("README.md", "LICENSE", "docs/cache.md", "src/headwater/cache/radix_tree.py", "docs/reliability.md",
         "src/headwater/devices/cpu/kernels/attention.c", "docs/rl.md", "src/headwater/engine/loop.py")  # fmt: skip
FORMS = {
    "bfloat16": WeightForm("bfloat16"),
    "float16": WeightForm("float16"),
    "int8": WeightForm("bfloat16", frozenset({"Q8_0"}), quantised="Q8_0"),
    "file": WeightForm("bfloat16", frozenset({"Q4_1", "Q8_0", "Q6_K"})),
    "int4": WeightForm("bfloat16", frozenset({"Q4_0"}), quantised="Q4_0"),
}
LOGIT_ROWS, PAGE_SIZE = 64, 16
Tokens = npt.NDArray[np.int32]


class FileWeights(GGUFWeights):
    """The tensors of the file; as plain numbers for a form that keeps none of its blocks."""

    form = WeightForm("float32")

    def load(self, name: str) -> HostTensor:
        weight = super().load(name)
        is_kept = weight.format in self.form.kept and not self.form.quantised
        return weight if is_kept else HostTensor.of(weight.to_float32())


def load(form: WeightForm, device: CpuDevice) -> tuple[DecoderModel, Any]:
    """The default model with its weights in `form`, and its config."""
    file = GGUFFile(ensure_default_model())
    config = read_gguf_config(file)
    source = FileWeights(file, config)
    source.form = form
    return build_decoder(config, PlacedWeights(source, device, form), device), config


def texts(num_tokens: int) -> list[Tokens]:
    """About equal beginnings of all texts, `num_tokens` together."""
    tokenizer = Tokenizer.load(ensure_default_model())
    each = -(-num_tokens // len(TEXTS))
    found = [tokenizer.encode((ROOT / name).read_text()[: 8 * each])[:each] for name in TEXTS]
    return [np.array(ids, dtype=np.int32) for ids in found]


def predictions(form: WeightForm, sequences: Sequence[Tokens], *, num_threads: int | None = None) -> list[Tokens]:
    """The most probable next token at every position of every sequence."""
    device = CpuDevice(num_threads=num_threads)
    model, config = load(form, device)
    layout = KVLayout(
        num_layers=config.num_layers, num_kv_heads=config.num_kv_heads, head_dim=config.head_dim,
        page_size=PAGE_SIZE, dtype=form.dtype,
    )  # fmt: skip
    num_pages = -(-max(map(len, sequences)) // PAGE_SIZE)
    kv = device.allocate_kv(layout, num_pages)
    recorded = RecordedModel(model, device, layout=layout)
    return [_predict(recorded, device, model, ids, kv=kv.memory, num_pages=num_pages) for ids in sequences]


def _predict(
    recorded: RecordedModel, device: CpuDevice, model: DecoderModel, ids: Tokens, *, kv: Any, num_pages: int
) -> Tokens:
    """One step with all tokens of a sequence, and the logits of all of them, a block after another."""
    starts, contexts = np.array([0, len(ids)], dtype=np.int32), np.array([len(ids)], dtype=np.int32)
    tables = np.arange(num_pages, dtype=np.int32)[None]
    work = device.attention_work(
        model.geometry, starts, contexts, page_tables=tables, page_size=PAGE_SIZE, num_decodes=0
    )
    step = StepArrays(
        token_ids=ids, positions=np.arange(len(ids), dtype=np.int32), query_starts=starts, context_lens=contexts,
        page_tables=tables, selected=np.zeros(0, dtype=np.int32), kv=kv, chunks=work.chunks,
        queries_per_chunk=work.queries_per_chunk, partial_slots=work.partial_slots, next_sharing=work.next_sharing,
        num_decodes=0, samples=False,
    )  # fmt: skip
    recorded.run(step)
    found = []
    for first in range(0, len(ids), LOGIT_ROWS):
        step = replace(step, selected=np.arange(first, min(first + LOGIT_ROWS, len(ids)), dtype=np.int32))
        recorded.run_logits(step)
        tokens, is_finite = recorded.most_probable(step)
        assert is_finite.all()
        found.append(tokens)
    return np.concatenate(found)


def agreement(found: Sequence[Tokens], expected: Sequence[Tokens]) -> float:
    """The part of all positions whose most probable token is the same."""
    same = [a == b for a, b in zip(found, expected, strict=True)]
    return float(np.concatenate(same).mean())


def predictions_of_transformers(sequences: Sequence[Tokens]) -> list[Tokens]:
    """The same of transformers in float32, which reads the file itself."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    path = ensure_default_model()
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=skeleton)["tensors"]
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.load_state_dict(tensors, strict=False)
    model.tie_weights()
    with torch.inference_mode():
        logits = (model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0] for ids in sequences)
        return [each.argmax(dim=-1).numpy().astype(np.int32) for each in logits]


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Agreement by form on the instruction set of this process."""
    sequences = texts(args.tokens)
    exact = predictions(WeightForm("float32"), sequences, num_threads=args.threads)
    found = {}
    if args.transformers:
        found["float32 and transformers"] = agreement(exact, predictions_of_transformers(sequences))
    for name in args.forms:
        found[name] = agreement(predictions(FORMS[name], sequences, num_threads=args.threads), exact)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=5000)
    parser.add_argument("--isa", nargs="+", default=[isa.name for isa in usable_instruction_sets()])
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--threads", type=int)
    parser.add_argument("--transformers", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one-set", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one_set:
        print(json.dumps(measure(args)))
        return
    results = {}
    for isa in args.isa:  # a process has one library
        command = [sys.executable, __file__, *sys.argv[1:], "--one-set"]
        environment = {**os.environ, "HEADWATER_CPU_ISA": isa}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        results[isa] = json.loads(done.stdout.splitlines()[-1])
        if isa == args.isa[0]:
            print(f"| of {args.tokens} tokens | {' | '.join(results[isa])} |\n|---" + "|---" * len(results[isa]) + "|")
        print(f"| {isa} | {' | '.join(f'{100 * part:.2f} %' for part in results[isa].values())} |", flush=True)
    if args.out:
        facts = {
            "date": str(date.today()), "what": "top-1 agreement with float32, teacher-forced, default model",
            "machine": platform.machine(), "command": sys.argv[1:], "texts": TEXTS, "agreement": results,
        }  # fmt: skip
        args.out.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
