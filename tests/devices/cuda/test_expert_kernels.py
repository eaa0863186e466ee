"""A layer of experts on a GPU against the definition in numpy. Without a card Triton interprets the kernels."""

from typing import Any

import numpy as np
import pytest
import torch

from headwater.devices.cpu.plain.experts import experts as plain_experts
from headwater.devices.cpu.plain.experts import route as plain_route
from headwater.devices.cuda import experts as cuda_experts
from headwater.devices.cuda.device import CudaDevice
from headwater.devices.cuda.kernels.experts import grouped
from headwater.devices.cuda.kernels.experts.route import route
from headwater.devices.cuda.kernels.rows import UnnormedRows
from headwater.devices.device import Activation, Experts, Routing
from headwater.devices.host_tensor import HostTensor
from interpreted_triton import exact_dots

pytestmark = [
    pytest.mark.slow,
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),  # of infinities, on purpose
]
IS_GPU = torch.cuda.is_available()
PLACE = torch.device("cuda" if IS_GPU else "cpu")
HIDDEN, INNER, NUM_EXPERTS, PER_TOKEN = 40, 24, 6, 2
DTYPES = [torch.float32, torch.bfloat16] if IS_GPU else [torch.float32]
Expert = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@pytest.fixture(autouse=True)
def _exact_dots(monkeypatch: pytest.MonkeyPatch) -> None:
    if not IS_GPU:
        exact_dots(monkeypatch)


def experts_of(*, dtype: torch.dtype = torch.float32, num: int = NUM_EXPERTS) -> list[Expert]:
    generator = torch.Generator().manual_seed(num)
    shapes = ((INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER))
    return [
        tuple((torch.randn(shape, generator=generator) * 0.3).to(PLACE, dtype) for shape in shapes) for _ in range(num)
    ]  # type: ignore[misc]


def pack(
    experts: list[Expert],
    *,
    per_token: int = PER_TOKEN,
    renormalises: bool = True,
    is_deterministic: bool = False,
    **options: Any,
) -> Experts:
    device = CudaDevice(PLACE, is_deterministic=is_deterministic)
    routing = Routing(per_token, renormalises)
    return device.pack_experts(iter(experts), num_experts=len(experts), routing=routing, **options)


def inputs(
    rows: int, *, dtype: torch.dtype = torch.float32, num: int = NUM_EXPERTS
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, HIDDEN, generator=generator).to(PLACE, dtype)
    return x, torch.randn(rows, num, generator=generator).to(PLACE)


def defined(
    x: torch.Tensor,
    logits: torch.Tensor,
    experts: list[Expert],
    *,
    per_token: int,
    renormalises: bool,
    biases: list[Expert] | None = None,
    activation: Activation = "silu",
) -> np.ndarray:
    chosen, weights = plain_route(logits.cpu().numpy(), per_token, renormalises=renormalises)
    matrices = [[each.float().cpu().numpy() for each in expert] for expert in experts]
    added = [[each.float().cpu().numpy() for each in expert] for expert in biases or []]
    return plain_experts(
        x.float().cpu().numpy(),
        chosen,
        weights,
        matrix=lambda e, which: matrices[e][which],
        num_experts=len(experts),
        bias=(lambda e, which: added[e][which]) if added else None,
        activation=activation,
    )


def assert_close(found: torch.Tensor, expected: np.ndarray, dtype: torch.dtype) -> None:
    bound = {torch.float32: 2e-5, torch.bfloat16: 2e-2}[dtype] * float(np.abs(expected).max())
    np.testing.assert_allclose(found.float().cpu().numpy(), expected, rtol=0, atol=bound)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "renormalises"), [(1, True), (4, False), (5, True), (50, False)])
def test_a_token_goes_through_its_experts(rows: int, renormalises: bool, dtype: torch.dtype) -> None:
    """Few tokens and many take other kernels."""
    experts = experts_of(dtype=dtype)
    layer = pack(experts, renormalises=renormalises)
    x, logits = inputs(rows, dtype=dtype)
    expected = defined(x, logits, experts, per_token=PER_TOKEN, renormalises=renormalises)
    assert_close(layer(x, logits), expected, dtype)
    residual = torch.randn(rows, HIDDEN, device=PLACE)
    total = residual.clone()
    layer.add_to(total, x, logits)
    assert_close(total - residual, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 4, 30])
def test_norms_and_sums_around_experts(rows: int, dtype: torch.dtype) -> None:
    """Experts norm the residual along with their products, and their sum is made with the norm of the next layer."""
    device, experts = CudaDevice(PLACE), experts_of(dtype=dtype)
    layer = pack(experts)
    norm, residual = torch.rand(HIDDEN, device=PLACE).to(dtype), torch.randn(rows, HIDDEN, device=PLACE)
    _, logits = inputs(rows)
    plain = device.rms_norm(residual, norm, 1e-5, offset=0.5)
    expected = defined(plain, logits, experts, per_token=PER_TOKEN, renormalises=True)
    x = device.rms_norm(residual, norm, 1e-5, offset=0.5, reader=layer)  # type: ignore[arg-type]
    assert isinstance(x, UnnormedRows) == (rows <= 4)
    assert_close(layer(x, logits), expected, dtype)
    total = residual.clone()
    found = device.add_and_norm(layer, total, (x, logits), norm, 1e-5)  # type: ignore[arg-type]
    assert_close(total - residual, expected, dtype)
    torch.testing.assert_close(found, device.rms_norm(total, norm, 1e-5), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("favourite", [None, NUM_EXPERTS - 1])
def test_rows_in_order_go_through_a_librarys_products(
    favourite: int | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same as tiles give; experts without rows, and one that all tokens choose."""
    if dtype == torch.float32 and IS_GPU:
        pytest.skip("the library multiplies bfloat16")
    experts = experts_of(dtype=dtype)
    layer = pack(experts)
    x, logits = inputs(50, dtype=dtype)
    logits[:, 1] = -100
    if favourite is not None:
        logits[:, favourite] = 100
    expected = defined(x, logits, experts, per_token=PER_TOKEN, renormalises=True)
    called = []
    monkeypatch.setattr(cuda_experts, "suits_ordered", lambda num_rows, *_, **__: called.append(num_rows) or True)
    assert_close(layer(x, logits), expected, torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    assert called == [50 * PER_TOKEN]
    total = torch.zeros(50, HIDDEN, device=PLACE)
    norm = torch.ones(HIDDEN, device=PLACE, dtype=dtype)
    found = CudaDevice(PLACE).add_and_norm(layer, total, (x, logits), norm, 1e-5)  # type: ignore[arg-type]
    assert_close(total, expected, dtype)
    torch.testing.assert_close(found, CudaDevice(PLACE).rms_norm(total, norm, 1e-5), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [2, 30])
def test_experts_with_biases_and_the_clamped_activation(rows: int, dtype: torch.dtype) -> None:
    """Numbers reach both limits; a lost or another expert's bias, or a lost clamp, is far off."""
    generator = torch.Generator().manual_seed(1)
    biases: list[Expert] = [
        tuple(torch.randn(size, generator=generator).to(PLACE, dtype) for size in (INNER, INNER, HIDDEN))
        for _ in range(NUM_EXPERTS)
    ]  # type: ignore[misc]
    experts, options = experts_of(dtype=dtype), {"biases": biases, "activation": "clamped_swiglu"}
    layer = pack(experts, **options)
    x, logits = inputs(rows, dtype=dtype)
    x *= 4
    gate, up = ((x.float() @ each.float().T) for each in experts[0][:2])
    assert gate.max() > 8 and up.max() > 8 and up.min() < -8
    expected = defined(x, logits, experts, per_token=PER_TOKEN, renormalises=True, **options)
    assert_close(layer(x, logits), expected, dtype)
    for number, given in enumerate(biases):
        for which in range(3):
            assert torch.equal(layer.bias(number, which), given[which])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "is_deterministic"), [(1, False), (4, True), (40, False)])
def test_experts_in_mxfp4_are_the_numbers_of_their_codes(rows: int, is_deterministic: bool, dtype: torch.dtype) -> None:
    """Every code with exponents from 2^-20 to 4; sizes that fill no whole tile. The file's blocks come back."""
    random, device = np.random.default_rng(rows), CudaDevice(PLACE, is_deterministic=is_deterministic)
    hidden, inner = 96, 64

    def draw(shape: tuple[int, int]) -> HostTensor:
        blocks = random.integers(0, 256, (shape[0], shape[1] // 32, 17), dtype=np.uint8)
        blocks[:, :, 0] = random.choice([107, 119, 123, 125, 129], p=[0.1, 0.2, 0.4, 0.25, 0.05], size=blocks.shape[:2])
        return HostTensor("MXFP4", shape, blocks.reshape(shape[0], -1))

    files = [[draw((inner, hidden)), draw((inner, hidden)), draw((hidden, inner))] for _ in range(NUM_EXPERTS)]
    placed = [tuple(device.place(each, form="MXFP4") for each in expert) for expert in files]
    layer = device.pack_experts(iter(placed), num_experts=NUM_EXPERTS, routing=Routing(PER_TOKEN, True))
    plain = [tuple(torch.from_numpy(each.to_float32()) for each in expert) for expert in files]
    generator = torch.Generator().manual_seed(rows)
    x = (torch.randn(rows, hidden, generator=generator) * 0.2).to(PLACE, dtype)
    logits = torch.randn(rows, NUM_EXPERTS, generator=generator).to(PLACE)
    expected = defined(x, logits, plain, per_token=PER_TOKEN, renormalises=True)  # type: ignore[arg-type]
    assert_close(layer(x, logits), expected, dtype)
    for number, expert in enumerate(files):
        for which, given in enumerate(expert):
            found = device.to_host(layer.matrix(number, which))
            assert isinstance(found, HostTensor) and np.array_equal(found.data, given.data)


@pytest.mark.parametrize(("rows", "favourite"), [(2, NUM_EXPERTS - 1), (40, 0)])
def test_all_rows_may_go_to_one_expert(rows: int, favourite: int) -> None:
    """The others get no row and no tile, the one more tiles than it has on average."""
    experts = experts_of()
    x, logits = inputs(rows)
    logits[:, favourite] = 30
    expected = defined(x, logits, experts, per_token=1, renormalises=True)
    assert_close(pack(experts, per_token=1)(x, logits), expected, torch.float32)


@pytest.mark.parametrize("rows", [2, 7])
def test_every_expert_may_be_chosen(rows: int) -> None:
    experts = experts_of(num=3)
    x, logits = inputs(rows, num=3)
    expected = defined(x, logits, experts, per_token=3, renormalises=False)
    assert_close(pack(experts, per_token=3, renormalises=False)(x, logits), expected, torch.float32)


ODD = [[1.5] * 6, [0, 2, 2, 2, 2, 0], [-np.inf, -np.inf, 1, -np.inf, -np.inf, -np.inf], [np.nan, 1, np.nan, 0, 0, 0]]


def test_ties_and_odd_logits_are_chosen_as_on_a_cpu() -> None:
    """Equal logits go to the lower numbers; a NaN leads to an expert that exists."""
    logits = torch.tensor(ODD, dtype=torch.float32, device=PLACE)
    for renormalises in (True, False):
        chosen, weights = route(logits, per_token=3, renormalises=renormalises)
        expected, shares = plain_route(logits.cpu().numpy(), 3, renormalises=renormalises)
        assert (chosen.cpu().numpy() - 1).tolist() == expected.tolist()
        np.testing.assert_allclose(weights.cpu().numpy(), shares, rtol=1e-5)
    experts = experts_of()
    for rows in (slice(0, 3), slice(0, 3, 1)):  # by the kernels of few tokens, then by tiles
        x, _ = inputs(6)
        some = logits[rows] if rows.step is None else logits[[0, 1, 2, 0, 1, 2]]
        found = pack(experts, per_token=3)(x[: len(some)], some)
        assert_close(found, defined(x[: len(some)], some, experts, per_token=3, renormalises=True), torch.float32)


@pytest.mark.parametrize("rows", [3, 9])
def test_a_row_that_is_not_finite_harms_no_other(rows: int) -> None:
    experts = experts_of()
    x, logits = inputs(rows)
    expected = pack(experts)(x, logits)
    x[1], logits[1] = torch.nan, torch.nan
    logits[2, 0] = torch.inf
    found = pack(experts)(x, logits)
    assert found[1].isnan().all() and found[2].isnan().all()
    kept = [row for row in range(rows) if row not in (1, 2)]
    torch.testing.assert_close(found[kept], expected[kept])


def test_a_rows_bits_depend_on_no_other_row_where_that_is_promised() -> None:
    layer = pack(experts_of(), is_deterministic=True)
    x, logits = inputs(40)
    logits[20:, 1] = 20
    whole = layer(x, logits)
    for rows in (slice(0, 1), slice(3, 7), slice(25, 40)):
        assert torch.equal(layer(x[rows], logits[rows]), whole[rows])


@pytest.mark.parametrize("rows", [32, 128])
def test_larger_tiles_compute_the_same(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = next(shape for _, shape in grouped.SHAPES if shape.rows == rows)
    monkeypatch.setattr(cuda_experts, "tile_shape", lambda *_, **__: shape)
    experts = experts_of()
    x, logits = inputs(90)
    expected = defined(x, logits, experts, per_token=PER_TOKEN, renormalises=True)
    assert_close(pack(experts)(x, logits), expected, torch.float32)


def test_matrices_are_views_of_the_layer() -> None:
    """In-place updates of weights write there, under the addresses of CUDA graphs."""
    experts = experts_of()
    layer = pack(experts)
    for number, expert in enumerate(experts):
        for which, given in enumerate(expert):
            assert torch.equal(layer.matrix(number, which), given)
    x, logits = inputs(2)
    logits[:, 3] = 30
    layer = pack(experts, per_token=1)
    assert not layer(x, logits).eq(0).any()
    layer.matrix(3, 2).zero_()
    assert layer(x, logits).eq(0).all()


def test_experts_of_two_formats_are_refused() -> None:
    experts = experts_of()
    experts[2] = experts_of(dtype=torch.bfloat16)[2]
    with pytest.raises(ValueError, match="the experts of a layer have one format and shape"):
        pack(experts)
