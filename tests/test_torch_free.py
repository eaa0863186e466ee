"""What a server on a CPU imports does without torch, whose import takes seconds and hundreds of MB."""

import subprocess
import sys

# the CPU's path; a module that begins to import torch, or something that does, is named by the test
MODULES = """
headwater.devices.cpu.attention_kernels
headwater.devices.cpu.device
headwater.devices.cpu.draws
headwater.devices.cpu.host_memory
headwater.devices.cpu.kernel_library
headwater.devices.cpu.kv_memory
headwater.devices.cpu.program
headwater.devices.cpu.topology
headwater.execution.cpu_runner
headwater.launch.assembly
headwater.launch.cpu_placement
headwater.launch.engine_api
headwater.models.decoder
headwater.models.loader
headwater.devices.cuda.driver
headwater.devices.device
headwater.devices.float8
headwater.devices.host_tensor
headwater.devices.kv_memory
headwater.devices.noise
headwater.devices.number_formats
headwater.execution.batch
headwater.execution.logprobs
headwater.execution.penalties
headwater.execution.prompt_logprobs
headwater.execution.sampler
headwater.launch.config
headwater.launch.default_model
headwater.models.end_tokens
headwater.models.registry
headwater.models.rope
headwater.models.weights
headwater.models.weights_gguf
headwater.models.weights_safetensors
""".split()

IMPORT_ALL = """
import importlib, sys
sys.modules["torch"] = sys.modules["gguf"] = None  # as if they were not installed
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ImportError as error:
        sys.exit(f"{name} is not imported without torch and gguf: {error}")
"""


def test_modules_of_the_cpu_path_do_not_import_torch() -> None:
    """Nor gguf, which takes 0.1 s and is only needed where blocks are dequantised."""
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL, *MODULES], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
