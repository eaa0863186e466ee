"""The small Triton kernels against PyTorch; without a GPU under Triton's interpreter."""

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F

from headwater.devices.cpu.plain.draw import log_noise
from headwater.devices.cuda.device import CudaDevice
from headwater.devices.cuda.kernels import layers, rounded
from headwater.devices.cuda.kernels.coded import sums
from headwater.devices.cuda.kernels.experts import grouped, ordered, route
from headwater.devices.cuda.kernels.greedy import GreedyScratch, choose_allowed, choose_greedy
from headwater.devices.cuda.kernels.layers import activate_mul, norm_columns, square_sums
from headwater.devices.cuda.kernels.rows import Parts
from headwater.devices.cuda.kernels.sampling import draw_part, draw_tokens
from headwater.devices.cuda.kernels.scatter import write_entries
from headwater.devices.device import RotaryAngles
from headwater.devices.noise import noise_keys

pytestmark = [pytest.mark.slow, pytest.mark.gpu]

PLACE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(PLACE)


@pytest.mark.parametrize("shape", [(1, 64), (5, 96), (3, 1000)])
def test_rms_norm_and_gate(shape: tuple[int, int]) -> None:
    x, weight = _random(*shape), _random(shape[1], seed=1).to(torch.bfloat16)
    expected = F.rms_norm(x, x.shape[-1:], weight.float(), 1e-5).to(torch.bfloat16)
    torch.testing.assert_close(CudaDevice(PLACE).rms_norm(x, weight, 1e-5), expected, rtol=1e-2, atol=1e-2)
    gate, up = x.chunk(2, dim=-1)
    torch.testing.assert_close(activate_mul(x, "silu"), F.silu(gate) * up, rtol=1e-5, atol=1e-5)


def test_norms_and_gates_of_single_families() -> None:
    """Norms with an offset and behind a block, of columns in place; GELU; gate and up in one matrix of a checkpoint."""
    device, x = CudaDevice(PLACE), _random(3, 96)
    weight, residual = _random(96, seed=1), _random(3, 96, seed=2)
    normed = F.rms_norm(x, x.shape[-1:], weight + 1, 1e-5)
    torch.testing.assert_close(device.rms_norm(x, weight, 1e-5, offset=1.0, scale=0.5), normed / 2)
    total = residual.clone()
    device.add_rms_norm(total, x.half(), weight, 1e-5, offset=1.0)
    torch.testing.assert_close(total, residual + normed, rtol=1e-2, atol=1e-2)
    rows = torch.cat((residual, x, residual), dim=1)
    norm_columns(rows[:, 96:192], weight, 1e-5, offset=1.0)
    torch.testing.assert_close(rows, torch.cat((residual, normed, residual), dim=1))
    gate_up = _random(50, 96, seed=3) / 9
    gate, up = gate_up.chunk(2)
    for num_tokens in (1, 3):
        some = x[:num_tokens]
        expected = F.gelu(some @ gate.T, approximate="tanh") * (some @ up.T)
        fused = device.pack_fused_gated_linear(gate_up, activation="gelu_tanh")
        torch.testing.assert_close(fused(some), expected, rtol=1e-4, atol=1e-5)
        apart = device.pack_gated_linear(gate, up, activation="gelu_tanh")
        torch.testing.assert_close(apart(some), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(fused.unpack()[0][0], gate_up)


def test_pairs_that_are_not_rotated_have_no_factor() -> None:
    """As on a CPU (test_row_kernels.py)."""
    rotary = RotaryAngles(np.array([1, 0], dtype=np.float32), 1.5)
    (cos,), (sin,) = CudaDevice(PLACE).rotary_tables([rotary], 8)
    assert cos[0].tolist() == [1.5, 1] and (cos[:, 1] == 1).all() and not sin[:, 1].any()
    torch.testing.assert_close(sin[7, 0].item(), 1.5 * np.sin(7.0))


def test_a_norm_that_ranks_share_takes_the_sums_of_all() -> None:
    """Two ranks with half of the columns each give what one has; the second one counts no keys."""
    rows, weight = torch.randn(5, 1536, device=PLACE), 1 + 0.1 * torch.randn(1536, device=PLACE)
    parts = [rows[:, :768].clone(), rows[:, 768:].clone()]
    sums = [square_sums(part, (0, 512), num) for part, num in zip(parts, ((512, 256), (512, 0)), strict=True)]
    squares = sums[0] + sums[1]
    expected = torch.stack(
        (rows[:, :512].square().sum(1) + rows[:, 768:1280].square().sum(1), rows[:, 512:768].square().sum(1)), 1
    )
    torch.testing.assert_close(squares, expected)
    for part, first in zip(parts, (0, 768), strict=True):
        norm_columns(
            part[:, :512], weight[first : first + 512], 1e-5, offset=0.5, squares=squares[:, 0], num_normed=1024
        )
    queries = torch.cat((rows[:, :512], rows[:, 768:1280]), dim=1)
    of_queries = torch.cat((weight[:512], weight[768:1280])) + 0.5
    normed = F.rms_norm(queries, (1024,), of_queries, 1e-5)
    torch.testing.assert_close(torch.cat((parts[0][:, :512], parts[1][:, :512]), dim=1), normed)
    assert torch.equal(parts[0][:, 512:], rows[:, 512:768]), "other columns stay"


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("has_bias", [False, True])
def test_linear_layers_of_few_tokens(num_tokens: int, has_bias: bool) -> None:
    """One token, several and many take different ways to the same numbers; sizes are no multiples of the blocks."""
    device = CudaDevice(PLACE)
    x, residual = _random(num_tokens, 1300), _random(num_tokens, 70, seed=2)
    weight, bias = _random(70, 1300, seed=3) / 36, _random(70, seed=4) if has_bias else None
    linear = device.pack_linear([weight[:50], weight[50:]], None if bias is None else [bias[:50], bias[50:]])
    expected = F.linear(x, weight, bias)
    torch.testing.assert_close(linear(x), expected, rtol=1e-4, atol=1e-4)
    total = residual.clone()
    linear.add_to(total, x)
    torch.testing.assert_close(total, residual + expected, rtol=1e-4, atol=1e-4)
    gate, up = weight.chunk(2)
    gate_bias, up_bias = (None, None) if bias is None else bias.chunk(2)
    gated = device.pack_gated_linear(gate, up, gate_bias=gate_bias, up_bias=up_bias)
    expected = F.silu(F.linear(x, gate, gate_bias)) * F.linear(x, up, up_bias)
    torch.testing.assert_close(gated(x), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(gated.unpack()[1][0], up)
    (first, _), (second, second_bias) = linear.unpack()
    assert torch.equal(torch.cat((first, second)), weight)
    assert bias is None or torch.equal(second_bias, bias[50:])
    assert torch.equal(linear.embed(torch.tensor([3, 69], device=PLACE)), weight[[3, 69]])


def test_the_greedy_token_is_the_first_largest_and_bad_logits_are_told() -> None:
    """A tie at a block's border, NaN and infinity: torch.argmax's answer, or the row is marked."""
    vocab_size = 9000
    logits = _random(5, vocab_size) * 3
    logits[1, [4095, 4096, 8999]] = 50.0
    logits[2, 7000] = math.nan
    logits[3, 10] = math.inf
    logits[4] = -7.0
    slots = torch.tensor([3, 0, 1, 4, 2], dtype=torch.int32, device=PLACE)
    newest = torch.full((6,), -1, dtype=torch.int32, device=PLACE)
    result = torch.full((2, 8), -1, dtype=torch.int32, device=PLACE)
    scratch = GreedyScratch(max_rows=5, vocab_size=vocab_size, device=PLACE)
    for _ in range(2):  # the second finds the counters as the first left them
        choose_greedy(logits, slots, newest=newest, result=result, scratch=scratch)
        assert result[1].tolist() == [1, 1, 0, 0, 1, -1, -1, -1]
        assert result[0, [0, 1, 4]].tolist() == [int(logits[0].argmax()), 4095, 0]
        assert result[0].lt(vocab_size).all()
        assert newest[slots.long()].tolist() == result[0, :5].tolist()
        assert newest[5] == -1


def test_the_greedy_token_under_a_mask_is_the_first_largest_allowed() -> None:
    """Each row has its own mask and may lie anywhere; forbidden, infinite and NaN logits choose nothing outside."""
    vocab_size = 9000
    logits = _random(6, vocab_size, seed=8) * 3
    logits[:, 17] = 90.0  # never allowed
    logits[4, [4095, 4096]] = 50.0  # a tie at a block's border
    logits[1, 7] = math.inf  # not allowed
    logits[5] = math.nan
    allowed = np.random.default_rng(9).random((6, vocab_size)) < np.array([[0.5], [0.5], [0.002], [0.0], [0.0], [1.0]])
    allowed[2, 4095:4097] = allowed[3, 8999] = allowed[4, :17] = True
    allowed[:, [7, 17]] = False
    rows = torch.tensor([3, 1, 4, 0, 2, 5], dtype=torch.int32, device=PLACE)
    newest = torch.full((10,), -1, dtype=torch.int32, device=PLACE)
    result = torch.full((2, 7), -1, dtype=torch.int32, device=PLACE)
    scratch = GreedyScratch(max_rows=6, vocab_size=vocab_size, device=PLACE)
    masks = _packed(allowed, num_words=283)
    masked = logits[rows.long()].cpu().masked_fill(~torch.from_numpy(allowed), -math.inf)
    for _ in range(2):  # the second finds the counters as the first left them
        choose_allowed(logits, rows, rows + 2, masks, newest=newest, result=result, scratch=scratch)
        assert result[0, rows.long()].tolist()[:5] == masked[:5].argmax(dim=1).tolist()
        assert result[0, [4, 0]].tolist() == [4095, 8999]
        assert 0 <= int(result[0, 5]) < vocab_size
        assert newest[rows.long() + 2].tolist() == result[0, rows.long()].tolist()
        assert result[0, 6] == -1 == newest[8]
        assert result[1].tolist() == [-1] * 7


def _packed(allowed: np.ndarray, *, num_words: int) -> torch.Tensor:
    """Masks of allowed tokens [N, vocab_size]; bits behind the vocabulary are set."""
    bits = np.ones((len(allowed), num_words * 32), dtype=bool)
    bits[:, : allowed.shape[1]] = allowed
    return torch.from_numpy(np.packbits(bits, axis=1, bitorder="little").view(np.int32).copy()).to(PLACE)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [
        (1.0, 0, 1.0, 0.0),
        (0.7, 0, 0.9, 0.0),
        (1.4, 40, 1.0, 0.0),
        (1.0, 7, 0.6, 0.0),
        (2.0, 0, 1.0, 0.2),
        (0.0, 0, 1.0, 0.0),
    ],
)
def test_draws_are_those_of_the_definition(temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    """Sort, cut, add the noise, take the largest: the kernel does it without sorting."""
    num_rows, vocab_size = 6, 9000
    logits = _random(num_rows, vocab_size, seed=5) * 3
    rows = torch.tensor([5, 0, 3, 1], dtype=torch.int32, device=PLACE)
    keys = noise_keys([11, 12, 13, 14], [0, 1, 2, 3])
    numbers = _parameters(keys, temperature=temperature, top_k=top_k, top_p=top_p, log_min_p=_log(min_p))
    newest = torch.full((10,), -1, dtype=torch.int32, device=PLACE)
    result = torch.full((2, num_rows), -1, dtype=torch.int32, device=PLACE)
    draw_tokens(logits, rows, rows + 2, torch.from_numpy(numbers).to(PLACE), newest=newest, result=result)
    for index, row in enumerate(rows.tolist()):
        expected = _drawn(logits[row].cpu(), keys[index : index + 1], temperature, top_k, top_p, _log(min_p))
        assert int(result[0, row]) == expected == int(newest[row + 2])
    assert result[0, [2, 4]].tolist() == [-1, -1]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [(0.0, 0, 1.0, 0.0), (1.0, 0, 1.0, 0.0), (1.4, 40, 1.0, 0.0), (1.0, 0, 0.6, 0.0), (2.0, 0, 1.0, 0.2)],
)
def test_masked_draws_are_those_among_the_allowed_tokens(
    temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    """Masks of many tokens, of a few, of one, and none; words behind the vocabulary mean nothing."""
    num_rows, vocab_size, num_words = 5, 9000, 283
    logits = _random(num_rows, vocab_size, seed=6) * 3
    allowed = np.random.default_rng(7).random((3, vocab_size)) < np.array([[0.5], [0.002], [0.0]])
    allowed[2, 8999] = True
    masks = _packed(allowed, num_words=num_words)
    rows, mask_of = torch.tensor([3, 4, 0, 1], dtype=torch.int32, device=PLACE), [1, -1, 0, 2]
    keys = noise_keys([21, 22, 23, 24], [5, 6, 7, 8])
    numbers = _parameters(keys, temperature=temperature, top_k=top_k, top_p=top_p, log_min_p=_log(min_p))
    numbers[6] = mask_of
    expected = []
    for index, (row, mask) in enumerate(zip(rows.tolist(), mask_of, strict=True)):
        masked = logits[row].cpu()
        if mask >= 0:
            masked = masked.masked_fill(~torch.from_numpy(allowed[mask]), -math.inf)
        expected.append(_drawn(masked, keys[index : index + 1], temperature, top_k, top_p, _log(min_p)))
    untouched = logits[[2, 4]].clone()
    newest = torch.full((10,), -1, dtype=torch.int32, device=PLACE)
    result = torch.full((2, num_rows), -1, dtype=torch.int32, device=PLACE)
    on_device = torch.from_numpy(numbers).to(PLACE)
    draw_tokens(logits, rows, rows + 2, on_device, newest=newest, result=result, masks=masks)
    assert result[0, rows.long()].tolist() == expected == newest[rows.long() + 2].tolist()
    assert expected[3] == 8999
    assert int(result[0, 2]) == -1
    assert torch.equal(logits[[2, 4]], untouched)


def _log(value: float) -> float:
    return math.log(value) if value else -math.inf


def _parameters(
    keys: np.ndarray, *, temperature: float, top_k: int, top_p: float, log_min_p: float
) -> npt.NDArray[np.int32]:
    """Rows of the kernel's parameters, one alike for each key, without masks."""
    numbers = np.full((7, len(keys)), -1, dtype=np.int32)
    numbers[:3] = np.array([[temperature], [top_p], [log_min_p]], dtype=np.float32).view(np.int32)
    numbers[3] = top_k
    numbers[4:6] = keys.view(np.int32).reshape(-1, 2).T
    return numbers


def _drawn(row: torch.Tensor, key: np.ndarray, temperature: float, top_k: int, top_p: float, log_min_p: float) -> int:
    if temperature == 0:
        return int(row.argmax())
    scaled = row / temperature
    values, ids = scaled.sort(descending=True, stable=True)
    values = values[: top_k or None]
    probabilities = values.softmax(dim=0)
    before = probabilities.cumsum(dim=0) - probabilities
    num_kept = int(((before < top_p) & (values - values[0] >= log_min_p)).sum())
    noise = log_noise(ids[:num_kept].numpy().astype(np.uint32), int(key[0]))
    return int(ids[(values[:num_kept].numpy() - noise).argmax()])


def test_scattered_entries_and_nothing_else_are_written() -> None:
    target = torch.zeros((4, 300), dtype=torch.int32, device=PLACE)
    at = torch.randperm(1200, generator=torch.Generator().manual_seed(1))[:600].int().to(PLACE)
    write_entries(target, at, at + 7)
    expected = torch.zeros(1200, dtype=torch.int32, device=PLACE)
    expected[at.long()] = at + 7
    assert torch.equal(target.view(-1), expected)


def test_the_best_of_parts_is_the_draw_from_all() -> None:
    """Two ranks have a part of the vocabulary each: noise of other tokens, or ties that the later part wins."""
    num_rows, cuts = 6, (range(700), range(700, 1000))
    logits = torch.from_numpy(np.random.default_rng(0).normal(0, 3, (num_rows, 1000)).astype(np.float32))
    logits[4] = 0.0
    rows = torch.arange(num_rows, dtype=torch.int32, device=PLACE)
    numbers = np.full((7, num_rows), -1, dtype=np.int32)
    numbers[:3] = np.array([[1.5] * num_rows, [1.0] * num_rows, [-np.inf] * num_rows], dtype=np.float32).view(np.int32)
    numbers[3] = 0
    numbers[4:6] = noise_keys(np.arange(num_rows), np.arange(num_rows)).view(np.int32).reshape(-1, 2).T
    params = torch.from_numpy(numbers).to(PLACE)
    newest, result = (torch.zeros(shape, dtype=torch.int32, device=PLACE) for shape in (num_rows, (2, num_rows)))
    draw_tokens(logits.to(PLACE), rows, rows, params, newest=newest, result=result)
    parts = [
        draw_part(
            logits[:, cut.start : cut.stop].contiguous().to(PLACE), rows, params,
            first_token=cut.start, max_token=cut.stop - 1,
        )
        for cut in cuts
    ]  # fmt: skip
    scores, tokens = (torch.stack([part[index] for part in parts]) for index in (0, 1))
    values = scores.view(torch.float32)
    best = torch.where(values == values.amax(dim=0), tokens, 1 << 30).amin(dim=0)
    assert best.tolist() == result[0].tolist()
    assert {token >= 700 for token in best.tolist()} == {True, False}


def test_many_rows_fit_in_a_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the first size of a grid may be above 65,535: a step of 8,192 tokens has as many rows of experts."""
    grids: list[tuple[int, ...]] = []
    launchers = [
        (layers, "_launch_norm"), (layers, "_launch_activate_mul"), (rounded, "_launch_round"),
        (rounded, "_launch_add_norm"), (rounded, "_launch_activate"), (sums, "_launch_sums"),
        (grouped, "_launch_sum"), (route, "_launch_route"), (ordered, "_launch_order"),
    ]  # fmt: skip
    for module, name in launchers:
        monkeypatch.setattr(module, name, lambda grid, *_, **__: grids.append(grid))
    num_rows = 70_000
    x, weight = torch.empty(num_rows, 2, dtype=torch.bfloat16), torch.empty(2)
    residual, logits = torch.empty(num_rows, 2), torch.empty(num_rows, 2)
    layers.rms_norm(residual, weight, 1e-5)
    activate_mul(x, "silu")
    rounded.round_tokens(x, 2)
    rounded.activate_round(x, "silu", group=1)
    counts = route.Counts.empty(num_rows, 2, per_token=1, device=x.device)
    experts, weights = route.route(logits, per_token=1, renormalises=True, counts=counts)
    rows = ordered.order_rows(x, experts, counts)
    parts = Parts(rows.rows, weights=weights, places=rows.places)
    rounded.add_and_norm(parts, residual, weight, 1e-5)
    grouped.sum_by_weight(parts, residual, adds=True)
    sums.add_sums(Parts(x[None]), residual, adds=True)
    assert len(grids) == len(launchers)
    assert all(size <= 65_535 for grid in grids for size in grid[1:]), grids
