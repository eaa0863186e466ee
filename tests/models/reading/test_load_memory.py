"""Memory while a model of several files is loaded: the weights, and a tenth of them at most."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from headwater.devices.cpu.kernel_library import usable_kernels
from headwater.devices.safetensors_header import build_header
from headwater.models.config import parse_hf_config

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 2048, "hidden_size": 768, "intermediate_size": 3072,
    "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 12, "max_position_embeddings": 64,
    "eos_token_id": 2,
}  # fmt: skip
LOAD = """
import re, sys
from pathlib import Path
from headwater.devices.cpu.device import CpuDevice
from headwater.models.loader import load_model, resolve_model

def kib(name):
    return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

files, device = resolve_model(sys.argv[1]), CpuDevice(num_threads=1)
before = kib("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
loaded = load_model(files, device=device, dtype="bfloat16")
print(loaded.weights_bytes, (kib("VmHWM") - before) * 1024)
"""


def write_shards(folder: Path) -> None:
    """230 MB in three files, in the order of the layers."""
    shapes = list(parse_hf_config(CONFIG, {}).parameter_shapes().items())
    rng = np.random.default_rng(0)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    places = {}
    for index in range(3):
        some = shapes[index * len(shapes) // 3 : (index + 1) * len(shapes) // 3]
        name = f"model-{index + 1:05}-of-00003.safetensors"
        with (folder / name).open("wb") as file:
            file.write(build_header((each, "BF16", shape) for each, shape in some))
            for each, shape in some:
                file.write((rng.bytes(int(np.prod(shape))) if len(shape) > 1 else b"?" * shape[0]) * 2)
                places[each] = name
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's peak of memory")
@pytest.mark.skipif(usable_kernels() is None, reason="numpy keeps the tensors of the files")
def test_memory_stays_near_the_size_of_the_weights(tmp_path: Path) -> None:
    """Tensors that are read ahead, and those that are being packed, exist beside the packed weights."""
    write_shards(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    weights_bytes, peak_bytes = map(int, done.stdout.split())
    assert weights_bytes > 200e6
    assert peak_bytes < 1.1 * weights_bytes + (4 << 20), f"{peak_bytes / weights_bytes:.2f} times the weights"
