"""The kernels of attention against their definition in numpy, on every instruction set that this CPU runs."""

import platform
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import sanitized
from attention_steps import NativeStep, PlainStep, Sequences, Span

from headwater.devices.cpu.attention_kernels import (
    BLOCK_KEYS,
    KV_DTYPES,
    MAX_PARTIALS,
    check_geometry,
    work_list,
)
from headwater.devices.cpu.kernel_build import (
    INSTRUCTION_SETS,
    SOURCES,
    build,
    compile_library,
    usable_instruction_sets,
)
from headwater.devices.cpu.kernel_library import KernelLibrary
from headwater.devices.number_formats import widen

pytestmark = pytest.mark.slow

EMULATED = "AMX in plain C"

# one mixed batch after another: prefills, a prefix and its rest, decodes; contexts on both sides of a block's border
LENGTHS = [2 * BLOCK_KEYS + 77, 130, 1, BLOCK_KEYS + 1]
STEPS: list[list[Span]] = [
    [(0, 0, 500), (1, 0, 129), (3, 0, BLOCK_KEYS - 1)],
    [(3, BLOCK_KEYS - 1, BLOCK_KEYS), (0, 500, 588), (2, 0, 1), (1, 129, 130)],
    [(0, 588, 589), (3, BLOCK_KEYS, BLOCK_KEYS + 1)],
]


_MANY_HEADS = 2 if sanitized.LIBRARY else 9  # two read and write what nine do
_HAS_EMULATION = platform.machine() == "x86_64" and not sanitized.LIBRARY  # others bring their library
_EMULATED_SETS = [pytest.param(EMULATED, marks=pytest.mark.emulated)] if _HAS_EMULATION else []
_SETS = [*(isa.name for isa in usable_instruction_sets()), *_EMULATED_SETS]


@pytest.fixture(scope="module", params=_SETS)
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> KernelLibrary:
    """Every instruction set that this CPU runs, and AMX's algorithm with another set's vectors."""
    isa = usable_instruction_sets()[-1] if request.param == EMULATED else INSTRUCTION_SETS[request.param]
    if sanitized.LIBRARY:
        return KernelLibrary(Path(sanitized.LIBRARY), isa)
    try:
        if request.param != EMULATED:
            return KernelLibrary(build(isa), isa)
        path = tmp_path_factory.mktemp("emulated") / "kernels.so"
        sources = [SOURCES / name for name in ("attention.c", "rotary.c", "run.c", "pool.c", "machine/pin.c")]
        compile_library(isa, path, sources=sources, extra_options=("-DHEADWATER_EMULATE_AMX", "-O1"))
        return KernelLibrary(path, replace(isa, name=EMULATED))
    except RuntimeError as error:
        if "no C compiler" not in str(error):
            raise  # sources that do not compile are a failure
        pytest.skip(str(error))


def _assert_step_is_right(native: NativeStep, sequences: Sequences, spans: list[Span]) -> None:
    """Attention is compared over the pages that the kernel wrote, so that a KV dtype's rounding does not matter."""
    plain_memory = sequences.memory.copy()
    qkv, out = native.run(spans)
    assert np.isfinite(out).all()
    if sanitized.LIBRARY:
        return
    np.testing.assert_allclose(PlainStep(sequences, plain_memory).prepare(spans), qkv, atol=3e-6)
    expected = PlainStep(sequences, sequences.memory).attend(qkv, spans)
    # tiles take queries and weights in bfloat16
    is_tiled = _has_tiles(native.library) and sequences.dtype not in ("float32", "float16")
    np.testing.assert_allclose(out, expected, atol=2e-2 if is_tiled else 1e-5)


def _has_tiles(library: KernelLibrary) -> bool:
    return library.isa.name in ("avx512_amx", EMULATED)


def _skip_if_emulated(library: KernelLibrary, dtype: str = "bfloat16", *, is_needed: bool = True) -> None:
    """The emulation is slow. Some dtypes take no tiles, so another set's run is the same; of shapes a few suffice."""
    if library.isa.name == EMULATED and (dtype in ("float32", "float16") or not is_needed):
        pytest.skip("as on another set")


def _dtype_of_products(library: KernelLibrary) -> str:
    """A KV dtype that the set's best products are for."""
    return "bfloat16" if _has_tiles(library) else "float32"


def _assert_same_pages(sequences: Sequences, spans: list[Span]) -> None:
    """The kernels' pages hold what the definition writes, up to one rounding step, and nothing else was touched."""
    if sanitized.LIBRARY:
        return
    memory = sequences.empty_memory()
    PlainStep(sequences, memory).prepare(spans)
    found, expected = sequences.pages(sequences.memory), sequences.pages(memory)
    steps = {"float32": 1e-6, "bfloat16": 2**-7, "float16": 2**-10, "float8_e4m3fn": 2**-3, "float8_e5m2": 2**-2}
    for which in (0, 1):
        for sequence, _, end in spans:
            pages = sequences.page_tables[sequence]
            np.testing.assert_allclose(
                found.read(which, pages, end), expected.read(which, pages, end), rtol=steps[sequences.dtype], atol=2e-6
            )
    zeros = np.zeros_like(memory)
    PlainStep(sequences, zeros).prepare(spans)
    is_untouched = zeros != memory  # whatever was written is the same in both
    assert is_untouched.any() and (sequences.memory[is_untouched] == 0xFF).all()


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "page_size"),
    [(2, 2, 1), (2, 2, 64), (6, 2, 16), (4, 1, 1), (4, 1, 16), (8, 1, 64), (14, 2, 1), (14, 2, 16), (14, 2, 64)],
)
def test_mixed_batches_of_all_shapes_of_heads(
    library: KernelLibrary, num_heads: int, num_kv_heads: int, page_size: int
) -> None:
    """Each ratio of heads stacks other rows into a tile; pages of one token have no run of keys at all."""
    _skip_if_emulated(library, is_needed=(num_heads, page_size) in ((6, 16), (14, 1)))
    dtype = _dtype_of_products(library)
    sequences = Sequences(LENGTHS, num_heads=num_heads, num_kv_heads=num_kv_heads, page_size=page_size, dtype=dtype)
    native = NativeStep(library, sequences)
    for spans in STEPS:
        _assert_step_is_right(native, sequences, spans)


@pytest.mark.parametrize(
    ("dtype", "head_dim"),
    [(dtype, dim) for dtype in ("float32", "bfloat16") for dim in (8, 24, 64, 72, 80, 96, 128, 256)]
    + [(dtype, dim) for dtype in KV_DTYPES[2:] for dim in (64, 72)],
)
def test_every_kv_dtype_and_head_dim(library: KernelLibrary, dtype: str, head_dim: int) -> None:
    """Heads that are no whole vectors have a tail, whose loads must not go beyond the head."""
    _skip_if_emulated(library, dtype, is_needed=head_dim in (24, 64, 72))
    sequences = Sequences(LENGTHS, num_heads=3, num_kv_heads=1, head_dim=head_dim, dtype=dtype, has_qk_norm=True)
    native = NativeStep(library, sequences)
    for spans in STEPS:
        _assert_step_is_right(native, sequences, spans)
    _assert_same_pages(sequences, [(0, 0, 589), (1, 0, 130), (2, 0, 1), (3, 0, BLOCK_KEYS + 1)])


@pytest.mark.parametrize(
    "context", [1, 7, 8, 9, 63, 64, 65, 255, 256, 257, *(() if sanitized.LIBRARY else (511, 700))]
)
def test_decode_at_odd_contexts(library: KernelLibrary, context: int) -> None:
    _skip_if_emulated(library, is_needed=context in (1, 9, 65, 257))
    sequences = Sequences([context] * 3, page_size=16, dtype=_dtype_of_products(library))
    native = NativeStep(library, sequences)
    if context > 1:
        native.run([(row, 0, context - 1) for row in range(3)])
    _assert_step_is_right(native, sequences, [(row, context - 1, context) for row in range(3)])


@pytest.mark.parametrize(
    ("window", "dtype", "num_heads", "page_size"),
    [
        (1, "float32", 3, 16),
        (9, "bfloat16", 6, 64),
        (100, "float8_e4m3fn", 3, 16),
        (BLOCK_KEYS - 1, "float32", 3, 1),
        (BLOCK_KEYS, "bfloat16", 3, 16),
        (BLOCK_KEYS + 1, "float16", 14, 16),
        (400, "float32", 1, 16),
        (1000, "bfloat16", 1, 16),
    ],
)
def test_windows(library: KernelLibrary, window: int, dtype: str, num_heads: int, page_size: int) -> None:
    """Smaller than a page, than a chunk and than a block of keys, and on both sides of the blocks' borders."""
    _skip_if_emulated(library, dtype, is_needed=window in (9, 100))
    sequences = Sequences(
        LENGTHS, num_heads=num_heads, num_kv_heads=1, page_size=page_size, dtype=dtype, window=window
    )
    native = NativeStep(library, sequences)
    for spans in STEPS:
        _assert_step_is_right(native, sequences, spans)


@pytest.mark.parametrize(
    ("dtype", "num_heads", "num_kv_heads", "window"),
    [
        ("float32", 6, 2, 0),
        ("bfloat16", 8, 1, 0),
        ("float8_e4m3fn", 14, 2, 0),
        ("float16", 3, 1, 100),
        ("bfloat16", 6, 1, BLOCK_KEYS + 1),
        ("float8_e5m2", 4, 4, 9),
    ],
)
def test_sinks(library: KernelLibrary, dtype: str, num_heads: int, num_kv_heads: int, window: int) -> None:
    """Each head has its own, beside every key that the query sees: in prompts, decodes and behind windows."""
    _skip_if_emulated(library, dtype, is_needed=dtype != "float8_e5m2")
    settings = {"num_kv_heads": num_kv_heads, "dtype": dtype, "window": window, "has_sinks": True}
    sequences = Sequences(LENGTHS, num_heads=num_heads, **settings)
    native = NativeStep(library, sequences)
    for spans in STEPS:
        _assert_step_is_right(native, sequences, spans)


@pytest.mark.parametrize("size", [-300.0, 300.0])
def test_a_sink_far_from_all_scores_overflows_nothing(library: KernelLibrary, size: float) -> None:
    """One far below them changes nothing; beside one far above them no key counts."""
    _skip_if_emulated(library)
    sequences = Sequences([70], num_heads=2, num_kv_heads=1, has_sinks=True, dtype="bfloat16")
    without = Sequences([70], num_heads=2, num_kv_heads=1, dtype="bfloat16")
    assert sequences.sinks is not None
    sequences.sinks[:] = size
    (_, found), (_, expected) = (NativeStep(library, each).run([(0, 0, 70)]) for each in (sequences, without))
    np.testing.assert_allclose(found, expected if size < 0 else 0 * expected, atol=1e-6)


def test_what_lies_before_a_window_is_never_read_as_a_number(library: KernelLibrary) -> None:
    sequences = Sequences([BLOCK_KEYS + 60, 40], num_heads=6, num_kv_heads=1, window=12)
    sequences.qkv[0][7, -3] = np.inf  # a value
    sequences.qkv[0][BLOCK_KEYS - 4, 6 * sequences.head_dim + 5] = np.nan  # a key
    _, out = NativeStep(library, sequences).run([(0, 0, BLOCK_KEYS + 60), (1, 0, 40)])
    is_finite = np.isfinite(out).all(axis=1)
    expected = np.ones(len(out), dtype=bool)
    expected[7:19] = expected[BLOCK_KEYS - 4 : BLOCK_KEYS + 8] = False
    np.testing.assert_array_equal(is_finite, expected)


@pytest.mark.parametrize(
    ("dtype", "window"),
    [*((dtype, 0) for dtype in KV_DTYPES), ("float32", 100), ("bfloat16", BLOCK_KEYS + 44), ("float8_e4m3fn", 20)],
)
def test_bits_depend_neither_on_chunks_nor_on_other_rows(library: KernelLibrary, dtype: str, window: int) -> None:
    """The same sequence whole, alone, in uneven chunks among others, and token by token at its end."""
    _skip_if_emulated(library, dtype)
    length = 2 * BLOCK_KEYS + 40
    has_sinks = dtype != "float32"
    settings = {"num_heads": 6, "num_kv_heads": 2, "dtype": dtype, "window": window, "seed": 3, "has_sinks": has_sinks}
    whole = Sequences([length, 90], **settings)
    _, expected = NativeStep(library, whole).run([(0, 0, length)])
    cuts = [0, 1, 65, 255, 257, 411, length - 3, length - 2, length - 1, length]
    cut = Sequences([length, 90], **settings)
    native = NativeStep(library, cut, seed=1)
    found = []
    for index, (begin, end) in enumerate(pairwise(cuts)):
        spans: list[Span] = [(1, 10 * index, 10 * index + 10), (0, begin, end)]
        found.append(native.run(spans, num_workers=1 + 7 * index)[1][10:])
    np.testing.assert_array_equal(np.concatenate(found).view(np.int32), expected.view(np.int32))


@pytest.mark.parametrize(("num_queries", "window"), [(1, 0), (5, 0), (1, 40), (5, BLOCK_KEYS + 12)])
def test_bits_do_not_depend_on_whether_a_row_is_split(
    library: KernelLibrary, num_queries: int, window: int
) -> None:
    """A long context's blocks by several threads in any order, against one after another by one."""
    _skip_if_emulated(library, is_needed=num_queries == 1)
    length = 3 * BLOCK_KEYS + 11
    spans: list[Span] = [(0, length - num_queries, length)]
    outs = []
    for num_workers in (1, 64):
        dtype = _dtype_of_products(library)
        settings = {"dtype": dtype, "window": window, "has_sinks": num_queries > 1}
        sequences = Sequences([length], num_heads=6, num_kv_heads=1, **settings)
        native = NativeStep(library, sequences, num_threads=4, seed=num_workers)
        native.run([(0, 0, length - num_queries)], num_workers=1)
        outs.append(native.run(spans, num_workers=num_workers)[1])
        assert (native.last_work.partial_slots[0] >= 0) == (num_workers == 64)
        assert not native.partials["num_done"].any()
    np.testing.assert_array_equal(outs[0].view(np.int32), outs[1].view(np.int32))
    _assert_step_is_right(native, sequences, spans)


@pytest.mark.parametrize(
    ("num_heads", "page_size", "dtype", "common", "window"),
    [
        (3, 16, "float32", 2 * BLOCK_KEYS + 30, 0),
        (3, 16, "bfloat16", 2 * BLOCK_KEYS + 200, 0),
        (_MANY_HEADS, 1, "float16", 2 * BLOCK_KEYS + 150, 0),
        (1, 1, "bfloat16", 2 * BLOCK_KEYS + 30, 0),
        (_MANY_HEADS, 512, "float8_e5m2", 512, 0),
        (3, 16, "float32", 2 * BLOCK_KEYS + 30, 10),
        (3, 16, "bfloat16", 2 * BLOCK_KEYS + 200, 250),
        (_MANY_HEADS, 1, "float16", 2 * BLOCK_KEYS + 150, 600),
    ],
)
def test_bits_do_not_depend_on_whether_rows_share_pages(
    library: KernelLibrary, num_heads: int, page_size: int, dtype: str, common: int, window: int
) -> None:
    """Decodes after a common prefix, computed once for all of them, also in a block where each goes on by itself."""
    _skip_if_emulated(library, dtype, is_needed=num_heads == 3)
    lengths = [common + 1, common + 300, common + 17, BLOCK_KEYS + 9, common + 2]
    settings = {"page_size": page_size, "dtype": dtype, "window": window, "has_sinks": page_size == 1}
    sequences = Sequences(lengths, num_heads=num_heads, num_kv_heads=1, **settings)
    num_pages = common // page_size
    for row in (1, 4):  # rows 0 and 2 differ; row 3 has another prefix
        sequences.page_tables[row, :num_pages] = sequences.page_tables[0, :num_pages]
        sequences.qkv[row][: num_pages * page_size] = sequences.qkv[0][: num_pages * page_size]
    native = NativeStep(library, sequences, num_threads=4)
    native.run([(row, 0, length - 1) for row, length in enumerate(lengths)])
    spans: list[Span] = [(row, length - 1, length) for row, length in enumerate(lengths)]
    _, expected = native.run(spans, num_workers=1, num_decodes=len(spans))
    for num_workers in (1, 2, 64):
        _, out = native.run(spans, num_workers=num_workers, shares_blocks=True, num_decodes=len(spans))
        assert (native.last_work.chunks < 0).sum() == 2 + (common > 2 * BLOCK_KEYS + 128)
        assert not native.partials["num_done"].any()
        np.testing.assert_array_equal(out.view(np.int32), expected.view(np.int32))


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_decodes_and_prompts_in_one_step_have_the_bits_of_steps_of_their_own(
    library: KernelLibrary, dtype: str
) -> None:
    """With AMX a row's kind decides how products are computed; in attention all rows are alike."""
    sequences = Sequences([BLOCK_KEYS + 30, 40, BLOCK_KEYS + 70, 1], num_heads=3, num_kv_heads=1, dtype=dtype)
    native = NativeStep(library, sequences)
    native.run([(0, 0, BLOCK_KEYS + 29), (1, 0, 39), (2, 0, BLOCK_KEYS + 10)])
    decodes: list[Span] = [(0, BLOCK_KEYS + 29, BLOCK_KEYS + 30), (1, 39, 40)]
    prompts: list[Span] = [(2, BLOCK_KEYS + 10, BLOCK_KEYS + 70), (3, 0, 1)]
    _, mixed = native.run([*decodes, *prompts], num_decodes=2)
    _, alone = native.run(decodes, num_decodes=2)
    np.testing.assert_array_equal(mixed[:2].view(np.int32), alone.view(np.int32))
    for first, prompt in zip((2, 62), prompts, strict=True):
        _, alone = native.run([prompt])
        np.testing.assert_array_equal(mixed[first : first + len(alone)].view(np.int32), alone.view(np.int32))
    _, as_prompts = native.run(decodes)
    np.testing.assert_array_equal(as_prompts.view(np.int32), mixed[:2].view(np.int32))


@pytest.mark.parametrize("dtype", KV_DTYPES)
def test_a_number_that_is_not_finite_stays_visible_and_in_its_row(library: KernelLibrary, dtype: str) -> None:
    """An overflow must reach the check of the logits: an 8-bit float cannot hold it, its exponent says so."""
    _skip_if_emulated(library, dtype)
    sequences = Sequences([40, 40], num_heads=2, num_kv_heads=1, dtype=dtype)
    sequences.qkv[0][7, -3] = np.inf  # a value
    sequences.qkv[0][7, 2 * sequences.head_dim + 5] = np.nan  # a key
    _, out = NativeStep(library, sequences).run([(0, 0, 40), (1, 0, 40)])
    assert np.isfinite(out[:7]).all()
    assert np.isnan(out[7:40]).any(axis=1).all()
    assert np.isfinite(out[40:]).all()


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "float16", "bfloat16"])
def test_stored_bytes_are_those_of_the_definition(library: KernelLibrary, dtype: str) -> None:
    """Values are stored as they come: every rounding, subnormal, tie and exponent, bit for bit."""
    sequences = Sequences([400], num_heads=1, num_kv_heads=1, head_dim=64, dtype=dtype)
    random = np.random.default_rng(1)
    sizes = np.exp2(random.uniform(-20, 9, size=(400, 64))) * np.exp2(random.integers(-90, 90, size=(400, 1)))
    values = (sizes * random.choice([-1, 1], size=sizes.shape)).astype(np.float32)
    codes = np.arange(128, dtype=np.uint8)
    numbers = widen(codes[:-8], "float8_e4m3fn")  # and what lies exactly between two of them
    values[0], values[1] = numbers[:64], (numbers[56:] + numbers[55:-1])[:64] / 2
    values[2] = 0
    values[3] = -0.0
    values[4], values[4, 5] = 1.0, np.nan
    sequences.qkv[0][:, -64:] = values
    NativeStep(library, sequences).run([(0, 0, 400)])
    memory = sequences.empty_memory()
    PlainStep(sequences, memory).prepare([(0, 0, 400)])
    found, expected = sequences.pages(sequences.memory), sequences.pages(memory)
    np.testing.assert_array_equal(found.stored(1)[:, 0], expected.stored(1)[:, 0])


def test_shapes_that_the_kernel_cannot_compute_are_refused() -> None:
    check_geometry(num_heads=14, num_kv_heads=2, head_dim=72)
    for num_heads, num_kv_heads, head_dim in ((4, 2, 60), (4, 2, 264), (97, 1, 64), (5, 2, 64)):
        with pytest.raises(ValueError, match="attention on a CPU needs"):
            check_geometry(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim)


@pytest.mark.parametrize("seed", range(20))
def test_the_work_list_covers_every_query_and_key_once(seed: int) -> None:
    random = np.random.default_rng(seed)
    query_lens = random.choice([1, 1, 1, 2, 33, 300], size=random.integers(1, 12))
    num_decodes = int(np.append(query_lens > 1, True).argmax())
    context_lens = (query_lens + random.integers(0, 5000, size=len(query_lens))).astype(np.int32)
    starts = np.concatenate(([0], np.cumsum(query_lens))).astype(np.int32)
    num_threads = int(random.integers(1, 65))
    tables = np.arange(len(query_lens) * 320, dtype=np.int32).reshape(-1, 320)
    shared_pages = int(random.integers(0, 100))
    tables[::2, :shared_pages] = tables[0, :shared_pages]
    work = work_list(
        starts,
        context_lens,
        num_heads=8,
        num_kv_heads=2,
        num_threads=num_threads,
        page_tables=tables,
        page_size=16,
        num_decodes=num_decodes,
    )
    is_shared = work.chunks < 0
    chunks = [int(chunk) for chunk in work.chunks[~is_shared]]
    for chunk in (work.chunks[is_shared] & (2**63 - 1)).tolist():
        row, num_common = chunk >> 32 & 0xFFFF, chunk & 0xFFFFFFFF or BLOCK_KEYS
        num_pages = (((chunk >> 48) - 1) * BLOCK_KEYS + num_common) // 16
        while row >= 0:
            assert row < num_decodes and (tables[row, :num_pages] == tables[0, :num_pages]).all()
            chunks.append(chunk >> 48 << 48 | row << 32)
            row = int(work.next_sharing[row])
    assert len(chunks) == len(set(chunks))
    blocks, rows, firsts = np.array([(chunk >> 48, chunk >> 32 & 0xFFFF, chunk & 0xFFFFFFFF) for chunk in chunks]).T
    used: set[int] = set()
    for row, (num, context) in enumerate(zip(query_lens.tolist(), context_lens.tolist(), strict=True)):
        first_slot = int(work.partial_slots[row])
        for first in range(0, num, work.queries_per_chunk):
            found = sorted(blocks[(rows == row) & (firsts == first)].tolist())
            last_key = context - num + min(first + work.queries_per_chunk, num)
            num_blocks = -(-last_key // BLOCK_KEYS)
            assert found == ([0] if first_slot < 0 else list(range(1, num_blocks + 1)))
        if first_slot >= 0:
            slots = set(range(first_slot, first_slot + num * -(-context // BLOCK_KEYS)))
            assert not slots & used and max(slots) < MAX_PARTIALS
            used |= slots


def test_a_long_context_alone_is_work_for_all_threads() -> None:
    """Not one thread for each KV head, which leaves most cores of a large machine idle."""
    work = work_list(np.array([0, 1]), np.array([8000]), num_heads=9, num_kv_heads=3, num_threads=16)
    assert 3 * len(work.chunks) >= 4 * 16
    work = work_list(np.array([0, 512]), np.array([512]), num_heads=9, num_kv_heads=3, num_threads=16)
    assert 3 * len(work.chunks) >= 4 * 16
