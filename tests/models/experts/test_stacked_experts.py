"""Experts that lie in one tensor for all of a layer, plain or in MXFP4: the numbers of single experts."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mxfp4_files import draw_tensors, from_mxfp4, widened, write_folder

from headwater.devices.cpu.device import CpuDevice
from headwater.devices.cpu.kernel_library import usable_kernels
from headwater.models.loader import load_model, open_weights, read_config, resolve_model
from headwater.models.model_files import ModelFileError
from headwater.models.weights import WeightSource, check_shapes

TENSORS = draw_tensors()
STEM = "model.layers.1.mlp.experts."


def opened(folder: Path) -> WeightSource:
    files = resolve_model(str(folder))
    config = read_config(files)
    source = open_weights(files, config, load_format="auto", seed=0)
    check_shapes(config.parameter_shapes(), source, tied_head=False)
    return source


def test_single_experts_have_the_numbers_of_their_stack(tmp_path: Path) -> None:
    """Gate and up lie in turn: the wrong half, or the next expert's, would be text of another model."""
    plain = opened(write_folder(tmp_path / "plain", widened(TENSORS), quantization_config=None))
    blocks = opened(write_folder(tmp_path / "blocks", TENSORS))
    gate_up = from_mxfp4(TENSORS[STEM + "gate_up_proj_blocks"], TENSORS[STEM + "gate_up_proj_scales"])
    down = from_mxfp4(TENSORS[STEM + "down_proj_blocks"], TENSORS[STEM + "down_proj_scales"])
    biases = TENSORS[STEM + "gate_up_proj_bias"], TENSORS[STEM + "down_proj_bias"]
    for expert in (0, 3, 5):
        for source in (plain, blocks):
            found = {
                name: source.load(f"{STEM}{expert}.{name}").to_float32()  # type: ignore[union-attr]
                for which in ("gate", "up", "down")
                for name in (f"{which}_proj.weight", f"{which}_proj.bias")
            }
            np.testing.assert_array_equal(found["gate_proj.weight"], gate_up[expert, 0::2])
            np.testing.assert_array_equal(found["up_proj.weight"], gate_up[expert, 1::2])
            np.testing.assert_array_equal(found["down_proj.weight"], down[expert])
            np.testing.assert_array_equal(found["gate_proj.bias"], biases[0][expert, 0::2])
            np.testing.assert_array_equal(found["up_proj.bias"], biases[0][expert, 1::2])
            np.testing.assert_array_equal(found["down_proj.bias"], biases[1][expert])


@pytest.mark.skipif(usable_kernels() is None, reason="no kernels for this CPU, or no compiler")
def test_mxfp4_stays_mxfp4_on_a_cpu(tmp_path: Path) -> None:
    """4.25 bits for a number, and the file's numbers come back."""
    device = CpuDevice(num_threads=1)
    loaded = load_model(resolve_model(str(write_folder(tmp_path, TENSORS))), device=device)
    numbers = sum(values.size * 2 for name, values in TENSORS.items() if name.endswith("_blocks"))
    others = sum(values.size for name, values in TENSORS.items() if not name.endswith(("_blocks", "_scales")))
    assert loaded.weights_bytes == numbers * 17 // 32 + 2 * others
    name = f"{STEM}4.up_proj.weight"
    expected = from_mxfp4(TENSORS[STEM + "gate_up_proj_blocks"], TENSORS[STEM + "gate_up_proj_scales"])[4, 1::2]
    np.testing.assert_array_equal(loaded.model.get_by_name(name).to_float32(), expected)
    bias = loaded.model.get_by_name(f"{STEM}4.up_proj.bias").to_float32()
    np.testing.assert_allclose(bias, TENSORS[STEM + "gate_up_proj_bias"][4, 1::2], rtol=2**-8)


def _changed(**changes: Any) -> dict[str, np.ndarray]:
    """The tensors of the middle layer's experts changed; None removes one."""
    found = TENSORS | {STEM + name: values for name, values in changes.items()}
    return {name: values for name, values in found.items() if values is not None}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (_changed(down_proj_scales=None), r"down_proj_blocks' has no .*down_proj_scales beside it"),
        (_changed(down_proj_blocks=None), r"down_proj_scales' has no .*down_proj_blocks beside it"),
        (_changed(down_proj_bias=None), r"lacks tensor '.*experts\.0\.down_proj\.bias'"),
        (_changed(down_proj=np.zeros((6, 96, 64), np.float32)), "is there in MXFP4 as well"),
        (
            _changed(gate_up_proj_scales=np.zeros((6, 192, 3), np.uint8)),
            r"gate_up_proj_blocks' of shape .* does not fit",
        ),
        (_changed(gate_up_proj_bias=np.zeros((5, 192), np.float32)), r"is F32\[5, 192\]: no stack of the 6 experts"),
        (_changed(down_proj_bias=np.zeros((6, 64), np.uint8)), r"is U8\[6, 64\]: no stack of the 6 experts"),
        (TENSORS | {"model.norm.weight": np.zeros(64, np.uint8)}, "is of type U8, and belongs to no experts in MXFP4"),
        (TENSORS | {"model.layers.7.mlp.experts.down_proj": np.zeros((6, 96, 64), np.float32)}, "lacks"),
    ],
)
def test_a_wrong_stack_is_named(tmp_path: Path, tensors: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(ModelFileError, match=message):
        opened(write_folder(tmp_path, tensors))


def test_what_is_only_plain_needs_no_config_of_a_quantisation(tmp_path: Path) -> None:
    """Whether stacks are in MXFP4 is seen in the files: trainers write plain ones beside the same config."""
    opened(write_folder(tmp_path, widened(TENSORS)))
