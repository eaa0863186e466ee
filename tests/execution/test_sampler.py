"""Sampling: who may be drawn, how often, and that a seed means the same in every batch."""

import numpy as np
import numpy.typing as npt
import pytest

from headwater.devices.cpu.device import CpuDevice
from headwater.execution.sampler import RowMasks, Sampler
from headwater.messages.generation import SamplingParams
from headwater.scheduling.plan import SlotAssignment

VOCAB_SIZE = 3000

Numbers = npt.NDArray[np.float32]


def _logits(rows: int, seed: int = 0, spread: float = 3.0) -> Numbers:
    return np.random.default_rng(seed).standard_normal((rows, VOCAB_SIZE), dtype=np.float32) * np.float32(spread)


def _sampler() -> Sampler:
    return Sampler(vocab_size=VOCAB_SIZE, device=CpuDevice(num_threads=1, use_kernels=False))


def _assign(sampler: Sampler, slot: int, sampling: SamplingParams, **fields: object) -> None:
    defaults = {"use": 1, "token_ids": np.array([1], dtype=np.int32), "num_prompt_tokens": 1, "stop_token_ids": ()}
    sampler.assign(SlotAssignment(slot=slot, sampling=sampling, **{**defaults, **fields}))  # type: ignore[arg-type]


def _sample_one(logits: Numbers, sampling: SamplingParams, position: int = 0) -> int:
    sampler = _sampler()
    return int(sampler.sample(logits.copy(), [sampling], slots=[0], num_outputs=[position])[0])


def _draws(row: Numbers, num: int, **fields: float) -> npt.NDArray[np.int64]:
    """`num` tokens of the same logits with seeds 0, 1, ..."""
    params = [SamplingParams(seed=seed, **fields) for seed in range(num)]
    sampler = _sampler()
    return sampler.sample(np.repeat(row, num, axis=0), params, slots=list(range(num)), num_outputs=[0] * num)


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=1.7, top_k=1, seed=9),
        SamplingParams(temperature=1e-9),
    ],
)
def test_greedy_is_the_exact_argmax(sampling: SamplingParams) -> None:
    logits = _logits(1)
    assert _sample_one(logits, sampling) == int(logits.argmax())


def test_a_seed_draws_the_same_token_in_any_batch_and_slot() -> None:
    """Every kind of row next to every other: none may shift another's noise or candidates."""
    kinds = [
        SamplingParams(seed=1),
        SamplingParams(seed=2, top_p=0.9),
        SamplingParams(seed=3, top_k=40),
        SamplingParams(temperature=0.0),
        SamplingParams(seed=4, min_p=0.02),
        SamplingParams(seed=5, top_k=2000, top_p=0.99, temperature=2.0),
        SamplingParams(seed=6, top_p=0.999999, temperature=5.0),  # a nucleus larger than the candidates
    ]
    logits = _logits(len(kinds))
    alone = [_sample_one(logits[row : row + 1], kind, position=11) for row, kind in enumerate(kinds)]
    for order in ([0, 1, 2, 3, 4, 5, 6], [6, 3, 0, 5, 2, 1, 4], [2, 6]):
        tokens = _sampler().sample(
            logits[order], [kinds[row] for row in order], slots=order[::-1], num_outputs=[11] * len(order)
        )
        assert tokens.tolist() == [alone[row] for row in order]


def test_tokens_of_one_request_differ_by_position() -> None:
    logits = _logits(1, spread=0.5)
    assert len({_sample_one(logits, SamplingParams(seed=3), position) for position in range(50)}) > 40


def _chi_square(draws: npt.NDArray[np.int64], probabilities: npt.NDArray[np.float64]) -> float:
    """Statistic over its degrees of freedom; about 1 when the draws follow `probabilities`."""
    expected = probabilities * len(draws)
    likely = expected >= 10
    counts = np.bincount(draws, minlength=len(probabilities))
    terms = (counts[likely] - expected[likely]) ** 2 / expected[likely]
    rest_expected, rest = expected[~likely].sum(), counts[~likely].sum()
    total = terms.sum() + ((rest - rest_expected) ** 2 / rest_expected if rest_expected > 1 else 0)
    return float(total / likely.sum())


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k", "min_p"),
    [(1.0, 1.0, -1, 0.0), (0.6, 1.0, -1, 0.0), (1.0, 0.7, -1, 0.0), (1.3, 1.0, 12, 0.0), (1.0, 0.8, 30, 0.0),
     (1.0, 1.0, -1, 0.1), (0.9, 0.95, 200, 0.05)],
)  # fmt: skip
def test_draws_follow_the_cut_distribution(temperature: float, top_p: float, top_k: int, min_p: float) -> None:
    """The definition, step by step: temperature, then top_k, then top_p, then min_p, then renormalised."""
    row = _logits(1, seed=6, spread=2.5)[:, :1000]
    probabilities = np.exp(row[0].astype(np.float64) / temperature)
    probabilities /= probabilities.sum()
    ids = np.argsort(-probabilities)
    ordered = probabilities[ids]
    if top_k > 0:
        ordered[top_k:] = 0
        ordered /= ordered.sum()
    before = np.cumsum(ordered) - ordered
    ordered[before >= top_p] = 0
    ordered[ordered < min_p * ordered[0]] = 0
    wanted = np.zeros_like(probabilities)
    wanted[ids] = ordered / ordered.sum()
    draws = _draws(row, 3000, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p)
    assert (wanted[draws] > 0).all(), "a token was drawn that the cuts exclude"
    assert _chi_square(draws, wanted) < 2.0


def test_top_p_keeps_the_token_that_crosses_the_threshold() -> None:
    """With 0.5 / 0.3 / 0.2, top_p = 0.6 keeps two tokens, top_p = 0.5 one, and a tiny top_p never none."""
    row = np.full((1, VOCAB_SIZE), -np.inf, dtype=np.float32)
    row[0, [7, 8, 9]] = np.log([0.5, 0.3, 0.2])
    assert set(_draws(row, 300, top_p=0.6).tolist()) == {7, 8}
    assert set(_draws(row, 100, top_p=0.4999).tolist()) == {7}
    assert set(_draws(row, 100, top_p=1e-9).tolist()) == {7}
    assert set(_draws(row, 500, top_p=1.0).tolist()) == {7, 8, 9}


def test_penalties_follow_their_formulas() -> None:
    """repetition over prompt and output by sign; frequency times the count; presence once; of outputs only."""
    sampling = SamplingParams(
        temperature=0.0, repetition_penalty=1.5, frequency_penalty=0.4, presence_penalty=0.3, logit_bias={50: 2.5}
    )
    sampler = _sampler()
    _assign(sampler, 4, sampling, token_ids=np.array([10, 11, 20, 20, 21], dtype=np.int32), num_prompt_tokens=2)
    base = _logits(1)
    base[0, [10, 20]] = [2.0, -1.0]
    edited = base.copy()
    sampler.sample(edited, [sampling], slots=[4], num_outputs=[3])
    expected = base.copy()
    for token in (10, 11, 20, 21):
        value = base[0, token]
        expected[0, token] = value / 1.5 if value > 0 else value * 1.5
    expected[0, 20] -= 2 * 0.4 + 0.3
    expected[0, 21] -= 1 * 0.4 + 0.3
    expected[0, 50] += 2.5
    np.testing.assert_allclose(edited, expected, rtol=1e-6)


def test_sampled_tokens_count_for_the_next_penalty() -> None:
    """With a frequency penalty of 2 and two tokens one apart, greedy must alternate."""
    sampling = SamplingParams(temperature=0.0, frequency_penalty=2.0)
    sampler = _sampler()
    _assign(sampler, 0, sampling)
    tokens = []
    for position in range(4):
        logits = np.full((1, VOCAB_SIZE), -50.0, dtype=np.float32)
        logits[0, [100, 200]] = [1.0, 0.0]
        tokens.append(int(sampler.sample(logits, [sampling], slots=[0], num_outputs=[position])[0]))
    assert tokens == [100, 200, 100, 200]


def test_a_slot_forgets_the_request_before() -> None:
    """Penalties of an earlier request in the slot would leak one user's text into another's."""
    sampler = _sampler()
    _assign(sampler, 0, SamplingParams(temperature=0.0, logit_bias={5: 100.0}))
    _assign(sampler, 0, SamplingParams(temperature=0.0))
    logits = _logits(1)
    want = int(logits.argmax())
    assert int(sampler.sample(logits, [SamplingParams(temperature=0.0)], slots=[0], num_outputs=[0])[0]) == want


def test_stop_tokens_are_masked_until_enough_tokens_are_there() -> None:
    sampling = SamplingParams(temperature=0.0, min_new_tokens=3)
    sampler = _sampler()
    _assign(sampler, 0, sampling, stop_token_ids=(7, 8))
    tokens = []
    for position in range(5):
        logits = np.zeros((1, VOCAB_SIZE), dtype=np.float32)
        logits[0, [7, 8, 9]] = [3.0, 2.0, 1.0]
        tokens.append(int(sampler.sample(logits, [sampling], slots=[0], num_outputs=[position])[0]))
    assert tokens == [9, 9, 9, 7, 7]


@pytest.mark.parametrize(("top_k", "top_p"), [(5, 1.0), (-1, 0.5)])
def test_of_equal_tokens_all_are_kept_or_none(top_k: int, top_p: float) -> None:
    """As on a GPU: which of them would stay is nobody's wish, and a seed would mean another token there."""
    row = np.full((1, VOCAB_SIZE), -100.0, dtype=np.float32)
    row[0, 500:510] = 3.0
    assert set(_draws(row, 200, top_k=top_k, top_p=top_p).tolist()) == set(range(500, 510))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "sampling", [SamplingParams(seed=1), SamplingParams(seed=1, top_p=0.9), SamplingParams(seed=1, top_k=9, min_p=0.1)]
)
def test_a_row_that_is_not_finite_yields_some_token(value: float, sampling: SamplingParams) -> None:
    """Its request fails afterwards; an exception would fail the whole step."""
    logits = np.full((2, VOCAB_SIZE), value, dtype=np.float32)
    logits[1, :100] = 0.0
    for token in _sampler().sample(logits, [sampling] * 2, slots=[0, 1], num_outputs=[0, 0]):
        assert 0 <= token < VOCAB_SIZE


# --- masks of grammars ------------------------------------------------------------------------------


def _masks(allowed: dict[int, list[int]]) -> RowMasks:
    """By row, the tokens that it may choose."""
    words = np.zeros((len(allowed), -(-VOCAB_SIZE // 32)), dtype=np.uint32)
    for index, tokens in enumerate(allowed.values()):
        for token in tokens:
            words[index, token // 32] |= np.uint32(1 << token % 32)
    return RowMasks(np.array(list(allowed), dtype=np.int32), words)


def test_masks_bind_their_own_rows_and_leave_the_others_alone() -> None:
    """Greedy and random rows with and without masks, side by side: a mask of the wrong row shows at once."""
    params = [
        SamplingParams(temperature=0.0),
        SamplingParams(seed=3),
        SamplingParams(temperature=0.0),
        SamplingParams(seed=4, top_p=0.9),
        SamplingParams(temperature=0.0, frequency_penalty=0.5),
        SamplingParams(seed=5, top_k=40, presence_penalty=0.3),
    ]
    logits, positions = _logits(len(params)), np.zeros(len(params), dtype=np.int32)
    sampler = _sampler()
    for slot, sampling in enumerate(params):
        _assign(sampler, slot, sampling)
    allowed = {1: [7, 2999], 2: [31, 32, 64], 4: [5], 5: [1000, 1001]}
    batch = sampler.batch(params, slots=range(len(params)))
    greedy = logits.argmax(axis=-1).astype(np.int32)
    free = batch.sample(logits.copy(), positions, greedy=greedy.copy())
    bound = batch.sample(logits.copy(), positions, greedy=greedy.copy(), masks=_masks(allowed))
    for row, tokens in allowed.items():
        assert bound[row] in tokens, f"row {row}"
    assert bound[2] == max(allowed[2], key=lambda token: logits[2, token])
    assert (bound[0], bound[3]) == (free[0], free[3])


def test_a_grammar_prevails_over_what_forbids_its_only_token() -> None:
    """min_new_tokens masks the stop token, and a bias may mask any other: the grammar still decides."""
    sampler = _sampler()
    params = [SamplingParams(temperature=0.0, min_new_tokens=5), SamplingParams(seed=1, logit_bias={8: -float("inf")})]
    _assign(sampler, 0, params[0], stop_token_ids=(9,))
    _assign(sampler, 1, params[1])
    logits = _logits(2)
    tokens = sampler.batch(params, slots=[0, 1]).sample(
        logits, np.zeros(2, dtype=np.int32), greedy=np.zeros(2, dtype=np.int32), masks=_masks({0: [9], 1: [8]})
    )
    assert tokens.tolist() == [9, 8]


def test_a_mask_renormalises_what_is_drawn() -> None:
    """Of two allowed tokens with logits a and b, the draws follow their softmax, whatever the others are."""
    logits = np.full((1, VOCAB_SIZE), 9.0, dtype=np.float32)
    logits[0, 10], logits[0, 2000] = 1.0, 0.0
    num = 4000
    params = [SamplingParams(seed=seed) for seed in range(num)]
    masks = _masks({row: [10, 2000] for row in range(num)})
    rows = np.repeat(logits, num, axis=0)
    sampler = _sampler()
    greedy = np.zeros(num, dtype=np.int32)
    found = sampler.batch(params, slots=range(num)).sample(rows, greedy, greedy=greedy.copy(), masks=masks)
    assert set(found.tolist()) == {10, 2000}
    assert abs((found == 10).mean() - 1 / (1 + np.exp(-1))) < 0.03
