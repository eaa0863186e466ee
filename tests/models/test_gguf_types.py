"""Our table of GGUF's tensor types, against the gguf package's."""

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from headwater.devices.host_tensor import STORAGE_TYPES, HostTensor
from headwater.models.gguf_types import GGUF_TYPES


def test_every_type_and_its_blocks_are_known() -> None:
    """A wrong size would read the neighbour's bytes as weights."""
    ours = {kind: (found.name, found.block_size, found.block_bytes) for kind, found in GGUF_TYPES.items()}
    assert ours == {int(kind): (kind.name, *GGML_QUANT_SIZES[kind]) for kind in GGMLQuantizationType}


@pytest.mark.parametrize("kind", GGMLQuantizationType, ids=lambda kind: kind.name)
def test_a_type_has_a_format_where_something_reads_its_numbers(kind: GGMLQuantizationType) -> None:
    found = GGUF_TYPES[kind]
    if found.form in STORAGE_TYPES:
        assert (found.block_size, found.block_bytes) == (1, STORAGE_TYPES[found.form].itemsize)
        return
    zeros = HostTensor(kind.name, (1, found.block_size), np.zeros((1, found.block_bytes), dtype=np.uint8))
    if found.form:
        assert found.form == kind.name and zeros.to_float32().shape == (1, found.block_size)
    else:
        with pytest.raises(ValueError, match="cannot be read"):
            zeros.to_float32()
