"""A server on a CPU runs without the extras: torch and Triton (gigabytes on a disk), and transformers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models

# the CPU's path; a module that begins to import torch, or something that does, is named by the test
MODULES = """
headwater.cli.main
headwater.cli.serve
headwater.devices.cpu.attention_kernels
headwater.devices.cpu.device
headwater.devices.cpu.draws
headwater.devices.cpu.host_memory
headwater.devices.cpu.kernel_library
headwater.devices.cpu.kv_memory
headwater.devices.cpu.program
headwater.devices.cpu.topology
headwater.devices.cuda.driver
headwater.devices.device
headwater.devices.float8
headwater.devices.host_tensor
headwater.devices.kv_memory
headwater.devices.noise
headwater.devices.number_formats
headwater.devices.quantise
headwater.execution.batch
headwater.execution.cpu_runner
headwater.execution.logprobs
headwater.execution.penalties
headwater.execution.prompt_parts
headwater.execution.sampler
headwater.execution.weight_store
headwater.launch.assembly
headwater.launch.config
headwater.launch.cpu_placement
headwater.launch.default_model
headwater.launch.engine_api
headwater.launch.placement
headwater.models.decoder
headwater.models.end_tokens
headwater.models.loader
headwater.models.registry
headwater.models.rope
headwater.models.weights
headwater.models.weights_gguf
headwater.models.weights_safetensors
headwater.server.api_process
headwater.server.engine_process
""".split()

IMPORT_ALL = """
import importlib, sys
for name in ("torch", "triton", "transformers", "gguf"):
    sys.modules[name] = None  # as if it were not installed
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ImportError as error:
        sys.exit(f"{name} is not imported without the extras and gguf: {error}")
"""


def test_modules_of_the_cpu_path_import_no_extras() -> None:
    """Nor gguf, which takes 0.1 s and is only needed where blocks are dequantised."""
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL, *MODULES], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 211,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}
SERVE = """
import importlib.util, sys
for name in ("torch", "triton", "transformers"):
    assert importlib.util.find_spec(name).origin.startswith(sys.argv[1]), f"the blocked {name} is not the first"
from headwater import Engine
with Engine(sys.argv[1], device="cpu", load_format="dummy", kv_cache_memory_mb=8, log_level="warning") as engine:
    greedy = {"max_new_tokens": 5, "temperature": 0.0, "ignore_eos": True}
    drawn = {**greedy, "temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.1}
    for sampling in (greedy, drawn):
        answer = engine.generate(input_ids=[5, 6, 7], sampling_params=sampling, return_logprob=True)
        assert len(answer["output_ids"]) == 5
"""


@pytest.mark.slow
def test_a_cpu_serves_where_no_extra_can_be_imported(tmp_path: Path) -> None:
    """Processes, loading, steps, sampling, log-probabilities: an import inside a function shows only here."""
    for name in ("torch", "triton", "transformers"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('{name} is blocked')")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    tokenizer = Tokenizer(models.BPE(vocab={chr(97 + index): index for index in range(26)}, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    path = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    done = subprocess.run(
        [sys.executable, "-c", SERVE, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
