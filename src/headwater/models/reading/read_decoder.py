"""A model out of a source of tensors: read ahead in threads, a little at a time, with progress."""

import logging
import math

from headwater.devices.device import ModelDevice
from headwater.models.config import ModelConfig
from headwater.models.decoder import DecoderModel
from headwater.models.reading.build_decoder import build_decoder
from headwater.models.reading.progress import Progress
from headwater.models.reading.read_ahead import ReadAhead
from headwater.models.weights import DummyWeights, PlacedWeights, WeightForm, WeightSource

# numbers of tensors that are read and not used yet: memory stays near the size of the weights
SHARE_AHEAD, LEAST_AHEAD = 0.03, 1 << 20
_log = logging.getLogger(__name__)


def read_decoder(
    source: WeightSource, config: ModelConfig, device: ModelDevice, *, form: WeightForm, num_bytes: int
) -> tuple[DecoderModel, PlacedWeights]:
    """The model of a source whose shapes have been checked, and its placed tensors. `num_bytes`: of its files."""
    is_read = not isinstance(source, DummyWeights)
    sizes = {name: math.prod(shape) for name, shape in config.parameter_shapes().items()}
    names = sorted(sizes, key=lambda name: ".layers." not in name) if is_read else []
    progress = Progress(sum(sizes.values()), num_bytes)
    most_numbers = max(LEAST_AHEAD, int(sum(sizes.values()) * SHARE_AHEAD))
    with ReadAhead(source, names, most_numbers=most_numbers, on_use=progress.add if is_read else None) as ahead:
        placed = PlacedWeights(ahead, device, form)
        model = build_decoder(config, placed, device)
    progress.end()
    for name, count in sorted(placed.widened.items()):
        _log.warning(
            "%d quantised matrices (%s) become %s on device %r: the same numbers but for a rounding, in more memory",
            count,
            name,
            form.dtype,
            device.name,
        )
    if is_read:
        _log.info("read %.2f GB of weights at %.2f GB/s", num_bytes / 1e9, progress.gb_per_s)
    return model, placed
