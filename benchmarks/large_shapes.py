#!/usr/bin/env python3
"""One row of a decode at the shapes of 1B to 8B models, beside ggml's llama-bench, on the CPU.

    large_shapes.py --llama-bench PATH [--shape 1b 3b 8b] [--format Q4_0 Q8_0] [--rounds 5] [--threads 2] [--folder DIR]

For each shape and format a GGUF file with random weights is written (0.7 to 8.5 GB, removed afterwards). Then the two
programs take turns on that file: a context of 200 tokens, 16 tokens. Both run without a server. The time is that of a
whole step, with its head.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import gguf
import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE / "serving"))
from results import save  # noqa: E402

CONTEXT, NUM_TOKENS = 200, 16
VOCAB_SIZE, NUM_KV_HEADS = 128_256, 8
# layers, hidden size, intermediate size, heads, head size: Llama 3.2 1B and 3B, Llama 3.1 8B
SHAPES = {"1b": (16, 2048, 8192, 32, 64), "3b": (28, 3072, 8192, 24, 128), "8b": (32, 4096, 14336, 32, 128)}
SCALES_AT = {"Q4_0": (0,), "Q4_1": (0, 2), "Q8_0": (0,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}


class RandomFile:
    """A GGUF file with random weights of one format. Scales are set, so that no product overflows."""

    def __init__(self, path: Path, shape: str, file_format: str) -> None:
        self._writer = gguf.GGUFWriter(path, "llama")
        self._shape, self._format = shape, file_format
        self._random = np.random.default_rng(0)

    def write(self) -> None:
        layers, hidden, intermediate, heads, head_size = SHAPES[self._shape]
        self._write_config()
        self._matrix("token_embd.weight", VOCAB_SIZE, hidden)
        for layer in range(layers):
            self._norm(f"blk.{layer}.attn_norm.weight", hidden)
            self._norm(f"blk.{layer}.ffn_norm.weight", hidden)
            for name, num_out, num_in in (
                ("attn_q", heads * head_size, hidden),
                ("attn_k", NUM_KV_HEADS * head_size, hidden),
                ("attn_v", NUM_KV_HEADS * head_size, hidden),
                ("attn_output", hidden, heads * head_size),
                ("ffn_gate", intermediate, hidden),
                ("ffn_up", intermediate, hidden),
                ("ffn_down", hidden, intermediate),
            ):
                self._matrix(f"blk.{layer}.{name}.weight", num_out, num_in)
        self._norm("output_norm.weight", hidden)
        self._writer.write_header_to_file()
        self._writer.write_kv_data_to_file()
        self._writer.write_tensors_to_file()
        self._writer.close()

    def _write_config(self) -> None:
        layers, hidden, intermediate, heads, head_size = SHAPES[self._shape]
        writer = self._writer
        writer.add_context_length(8192)
        writer.add_embedding_length(hidden)
        writer.add_block_count(layers)
        writer.add_feed_forward_length(intermediate)
        writer.add_head_count(heads)
        writer.add_head_count_kv(NUM_KV_HEADS)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_rope_dimension_count(head_size)
        writer.add_rope_freq_base(500_000.0)
        writer.add_vocab_size(VOCAB_SIZE)
        writer.add_tokenizer_model("no_vocab")

    def _norm(self, name: str, size: int) -> None:
        self._writer.add_tensor(name, np.ones(size, np.float32))

    def _matrix(self, name: str, num_out: int, num_in: int) -> None:
        raw_type = gguf.GGMLQuantizationType[self._format]
        if self._format == "BF16":
            numbers = self._random.standard_normal(num_out * num_in, dtype=np.float32) * np.float32(0.02)
            high_halves = (numbers.view(np.uint32) >> 16).astype(np.uint16)
            self._writer.add_tensor(name, high_halves.view(np.uint8).reshape(num_out, -1), raw_dtype=raw_type)
            return
        block_size, block_bytes = gguf.GGML_QUANT_SIZES[raw_type]
        num_blocks = num_out * num_in // block_size
        blocks = self._random.integers(0, 256, (num_blocks, block_bytes), dtype=np.uint8)
        for at in SCALES_AT[self._format]:
            blocks[:, at : at + 2] = np.full((num_blocks, 1), 3e-4, np.float16).view(np.uint8)
        self._writer.add_tensor(name, blocks.reshape(num_out, -1), raw_dtype=raw_type)


def run_ours(path: Path, threads: int) -> float:
    command = [sys.executable, "-m", "headwater", "bench", "--model", str(path), "--case", f"1x{CONTEXT}", "--json"]
    command += ["--threads", str(threads), "--repeat", str(NUM_TOKENS)]
    return json.loads(_output(command))[0]["median_ms"]


def run_theirs(path: Path, threads: int, llama_bench: str) -> float:
    command = [llama_bench, "-m", str(path), "-t", str(threads), "-p", "0", "-n", str(NUM_TOKENS)]
    command += ["-d", str(CONTEXT), "-r", "1", "-o", "json"]
    return json.loads(_output(command))[0]["avg_ns"] / 1e6 / NUM_TOKENS


def _output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    if done.returncode:
        raise SystemExit(f"{command[0]}: exit {done.returncode}\n{done.stderr[-2000:]}")
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-bench", required=True)
    parser.add_argument("--shape", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--format", nargs="+", choices=[*SCALES_AT, "BF16"], default=["Q4_0", "Q8_0"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", help="where the files are written; default: a temporary folder")
    args = parser.parse_args()
    records = []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for shape in args.shape:
            for file_format in args.format:
                path = Path(folder) / f"{shape}-{file_format}.gguf"
                RandomFile(path, shape, file_format).write()
                runs = []
                for _ in range(args.rounds):
                    theirs = run_theirs(path, args.threads, args.llama_bench)
                    runs.append((run_ours(path, args.threads), theirs))
                path.unlink()
                ours, theirs = (statistics.median(column) for column in zip(*runs, strict=True))
                ratio = theirs / ours
                print(f"{shape} {file_format}: {ours:.1f} ms, llama-bench {theirs:.1f} ms, {ratio:.2f}x", flush=True)
                for server, column in zip(("headwater", "llama-bench"), zip(*runs, strict=True), strict=True):
                    row = {"server": server, "shape": shape, "format": file_format}
                    records += [row | {"step_ms": ms} for ms in column]
    print(save("large-shapes", records, servers={"headwater": "bench", "llama-bench": "llama-bench"}))


if __name__ == "__main__":
    main()
