"""What runs without PyTorch: a server on a CPU, one day; its parts, today."""

import subprocess
import sys

import pytest

WITHOUT_TORCH = [
    "headwater.devices.host_tensor",
    "headwater.models.end_tokens",
    "headwater.models.registry",
    "headwater.models.rope",
    "headwater.models.weights_gguf",
    "headwater.models.weights_safetensors",
]


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_a_module_is_imported_without_torch(module: str) -> None:
    """An import of torch takes a second and 200 MB; where it is absent, the module must work all the same."""
    code = f"import sys; sys.modules['torch'] = None; import {module}"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
