"""Choose the next token of each row. Greedy rows cost one argmax; only rows that need more pay for more."""

import math
from collections.abc import Sequence

import torch

from headwater.devices.cpu.device import CpuDevice
from headwater.devices.noise import NoiseKeys, exponential_noise, noise_keys
from headwater.execution.penalties import LogitEdits, needs_edits
from headwater.messages.generation import SamplingParams
from headwater.scheduling.plan import SlotAssignment

# Below this, dividing logits by the temperature overflows before it makes a difference to greedy.
_GREEDY_TEMPERATURE = 1e-6
# Finding the few most probable ids is far cheaper than sorting them all, and nuclei are almost always small.
_CANDIDATES = (256, 4096)


class Sampler:
    """Samples rows of logits by their requests' parameters; keeps what penalties need to know per slot."""

    def __init__(self, *, vocab_size: int, device: CpuDevice) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._edits: dict[int, LogitEdits] = {}  # by slot

    def assign(self, assignment: SlotAssignment) -> None:
        """A request enters a slot."""
        self._edits.pop(assignment.slot, None)
        if needs_edits(assignment.sampling):
            self._edits[assignment.slot] = LogitEdits(
                assignment, vocab_size=self._vocab_size, device=self._device.torch_device
            )

    def sample(
        self,
        logits: torch.Tensor,
        params: Sequence[SamplingParams],
        *,
        slots: Sequence[int],
        num_outputs: Sequence[int],
    ) -> torch.Tensor:
        """One token per row, int64[rows] on the host. float32 `logits` [rows, vocab_size] may be overwritten.

        `num_outputs` is how many tokens each request has generated before: the position of its noise.
        """
        edited = [(row, self._edits[slot]) for row, slot in enumerate(slots) if slot in self._edits]
        for row, edits in edited:
            edits.apply(logits[row], num_outputs[row])
        tokens = self._device.argmax(logits)
        random = [row for row, sampling in enumerate(params) if not is_greedy(sampling)]
        if random:
            tokens[random] = self._draw(
                _rows(logits, random), [params[row] for row in random], [num_outputs[row] for row in random]
            )
        tokens = tokens.cpu()
        for row, edits in edited:
            edits.count(tokens[row : row + 1])
        return tokens

    def _draw(self, logits: torch.Tensor, params: Sequence[SamplingParams], num_outputs: Sequence[int]) -> torch.Tensor:
        """Sample every row. Rows that cut the distribution look at as few candidates as they can."""
        scaled = logits / _column([sampling.temperature for sampling in params], logits)
        keys = noise_keys([sampling.seed for sampling in params], num_outputs)
        tokens = torch.empty(len(params), dtype=torch.int64, device=logits.device)
        whole = [row for row, sampling in enumerate(params) if not has_cut(sampling)]
        if whole:
            part = _rows(scaled, whole)
            _cut_min_p(part, [params[row] for row in whole])
            tokens[whole] = self._device.draw(part, keys[whole])
        pending = [row for row, sampling in enumerate(params) if has_cut(sampling)]
        for num in (*_CANDIDATES, self._vocab_size):
            if pending:
                part = _rows(scaled, pending)
                chosen, is_covered = _draw_among(part, [params[row] for row in pending], keys[pending], num)
                tokens[pending] = chosen
                pending = [row for row, done in zip(pending, is_covered.tolist(), strict=True) if not done]
        return tokens


def has_cut(sampling: SamplingParams) -> bool:
    """Whether top_k or top_p leaves out ids, which needs the most probable ids in order."""
    return sampling.top_k > 0 or sampling.top_p < 1.0


def is_greedy(sampling: SamplingParams) -> bool:
    return sampling.temperature < _GREEDY_TEMPERATURE or sampling.top_k == 1


def _draw_among(
    scaled: torch.Tensor, params: Sequence[SamplingParams], keys: NoiseKeys, num: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample among the `num` most probable ids: tokens int64[rows], and where those were enough, bool[rows].

    top_k comes first; top_p then keeps the fewest most probable ids whose probabilities, renormalised after
    top_k, sum to it; min_p last.
    """
    vocab_size = scaled.shape[1]
    num = min(num, vocab_size)
    values, ids = scaled.topk(num, dim=-1)  # descending
    limits = [sampling.top_k if 0 < sampling.top_k < vocab_size else vocab_size for sampling in params]
    limit = _column([float(limit) for limit in limits], scaled)
    values.masked_fill_(torch.arange(num, device=scaled.device) >= limit, -math.inf)
    total = torch.where(limit <= num, values.logsumexp(-1, True), scaled.logsumexp(-1, True))
    cumulative = (values - total).exp_().cumsum(dim=-1)
    top_p = _column([sampling.top_p for sampling in params], scaled)
    has_top_k = limit < vocab_size
    is_covered = torch.where(has_top_k, limit <= num, cumulative[:, -1:] >= top_p)[:, 0]
    before = torch.cat((torch.zeros_like(top_p), cumulative[:, :-1]), dim=-1)
    values.masked_fill_((before >= top_p) & (top_p < 1.0), -math.inf)
    _cut_min_p(values, params)
    winners = values.sub_(exponential_noise(keys, ids).log_()).argmax(dim=-1, keepdim=True)
    return ids.gather(1, winners)[:, 0], is_covered | (num == vocab_size)


def _rows(x: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """The given rows; no copy if they are all rows."""
    return x if len(rows) == len(x) else x[rows]


def _cut_min_p(scaled: torch.Tensor, params: Sequence[SamplingParams]) -> None:
    """Drop ids less probable than min_p times the most probable one, in place."""
    if any(sampling.min_p > 0 for sampling in params):
        log_ratio = [math.log(sampling.min_p) if sampling.min_p > 0 else -math.inf for sampling in params]
        floor = scaled.amax(dim=-1, keepdim=True) + _column(log_ratio, scaled)
        scaled.masked_fill_(scaled < floor, -math.inf)


def _column(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    """float32[rows, 1] on the device of `like`."""
    return torch.tensor(values, dtype=torch.float32, device=like.device)[:, None]
