"""Choose the next token of each row. Greedy rows cost one argmax; only rows that need more pay for more."""

import math
from collections.abc import Sequence

import torch

from headwater.execution.noise import exponential_noise
from headwater.execution.penalties import LogitEdits, needs_edits
from headwater.messages import SamplingParams
from headwater.scheduling.plan import SlotAssignment

# Below this, dividing logits by the temperature overflows before it makes a difference to greedy.
_GREEDY_TEMPERATURE = 1e-6
# Nuclei are almost always smaller than this; a row whose nucleus is not gets sorted whole.
_NUCLEUS_CANDIDATES = 1024


class Sampler:
    """Samples rows of logits by their requests' parameters; keeps what penalties need to know per slot."""

    def __init__(self, *, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._all_ids = torch.arange(vocab_size, device=device)[None]
        self._edits: dict[int, LogitEdits] = {}  # by slot

    def assign(self, assignment: SlotAssignment) -> None:
        """A request enters a slot."""
        self._edits.pop(assignment.slot, None)
        if needs_edits(assignment.sampling):
            self._edits[assignment.slot] = LogitEdits(assignment, vocab_size=self._vocab_size, device=self._device)

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
        tokens = logits.argmax(dim=-1)
        random_rows = [row for row, sampling in enumerate(params) if not is_greedy(sampling)]
        if random_rows:
            tokens[random_rows] = self._draw(logits, params, random_rows, num_outputs)
        tokens = tokens.cpu()
        for row, edits in edited:
            edits.count(int(tokens[row]))
        return tokens

    def _draw(
        self,
        logits: torch.Tensor,
        params: Sequence[SamplingParams],
        rows: list[int],
        num_outputs: Sequence[int],
    ) -> torch.Tensor:
        """Sample `rows`: those that cut the distribution among a few candidates, the others among all ids."""
        tokens = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
        is_cut = [params[row].top_k > 0 or params[row].top_p < 1.0 for row in rows]
        for cut in (False, True):
            where = [index for index, this in enumerate(is_cut) if this is cut]
            if not where:
                continue
            group = [rows[index] for index in where]
            chosen = [params[row] for row in group]
            scaled = logits[group] / _column([sampling.temperature for sampling in chosen], logits)
            if cut:
                scaled, ids = _candidates(scaled, chosen)
            else:
                ids = self._all_ids
            _cut_min_p(scaled, chosen)
            noise = exponential_noise(
                [sampling.seed for sampling in chosen], [num_outputs[row] for row in group], token_ids=ids
            )
            winners = scaled.sub_(noise.log_()).argmax(dim=-1, keepdim=True)
            tokens[where] = ids.expand(len(group), -1).gather(1, winners)[:, 0]
        return tokens


def is_greedy(sampling: SamplingParams) -> bool:
    return sampling.temperature < _GREEDY_TEMPERATURE or sampling.top_k == 1


def _candidates(scaled: torch.Tensor, params: Sequence[SamplingParams]) -> tuple[torch.Tensor, torch.Tensor]:
    """The top_k and then top_p candidates of each row: logits (-inf where cut), and ids. [rows, n] both.

    top_p keeps the fewest most probable ids whose probabilities, renormalised after top_k, sum to top_p.
    """
    vocab_size = scaled.shape[1]
    limits = [min(sampling.top_k, vocab_size) if sampling.top_k > 0 else vocab_size for sampling in params]
    num = min(max(min(limit, _NUCLEUS_CANDIDATES) if limit == vocab_size else limit for limit in limits), vocab_size)
    while True:
        values, ids = scaled.topk(num, dim=-1)  # descending
        limit = _column([float(limit) for limit in limits], scaled)
        values.masked_fill_(torch.arange(num, device=scaled.device) >= limit, -math.inf)
        # Rows with a top_k are normalised over it (it is <= num); the others over the whole vocabulary.
        total = torch.where(limit < vocab_size, values.logsumexp(-1, True), scaled.logsumexp(-1, True))
        cumulative = (values - total).exp_().cumsum(dim=-1)
        top_p = _column([sampling.top_p for sampling in params], scaled)
        is_covered = (cumulative[:, -1:] >= top_p) | (limit <= num)
        if num == vocab_size or bool(is_covered.all()):
            break
        num = vocab_size
    before = torch.cat((torch.zeros_like(top_p), cumulative[:, :-1]), dim=-1)
    values.masked_fill_((before >= top_p) & (top_p < 1.0), -math.inf)
    return values, ids


def _cut_min_p(scaled: torch.Tensor, params: Sequence[SamplingParams]) -> None:
    """Drop ids less probable than min_p times the most probable one, in place."""
    if any(sampling.min_p > 0 for sampling in params):
        log_ratio = [math.log(sampling.min_p) if sampling.min_p > 0 else -math.inf for sampling in params]
        floor = scaled.amax(dim=-1, keepdim=True) + _column(log_ratio, scaled)
        scaled.masked_fill_(scaled < floor, -math.inf)


def _column(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    """float32[rows, 1] on the device of `like`."""
    return torch.tensor(values, dtype=torch.float32, device=like.device)[:, None]
