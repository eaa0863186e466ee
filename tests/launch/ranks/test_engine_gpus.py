"""Engines and their ranks take GPUs of their own, or say at the start which flag shares them."""

import pytest

from headwater.launch.config import ServerArgs
from headwater.launch.ranks import engine_gpus
from headwater.launch.ranks.engine_gpus import choose_gpus


@pytest.fixture(params=[4], autouse=True)
def num_gpus(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_gpus, "_num_gpus", lambda: request.param)


def chosen(**options: object) -> list[tuple[int, ...]]:
    args = ServerArgs(device="cuda", **options)  # type: ignore[arg-type]
    return [choose_gpus(args, index=index)[1] for index in range(args.dp_size)]


def shares(**options: object) -> list[float | None]:
    args = ServerArgs(device="cuda", **options)  # type: ignore[arg-type]
    each = [choose_gpus(args, index=index)[0] for index in range(args.dp_size)]
    return [it.for_device("cuda").mem_fraction_static for it in each]


def test_each_engine_has_gpus_of_its_own_and_all_of_their_memory() -> None:
    assert chosen(dp_size=3) == [(0,), (1,), (2,)]
    assert chosen(dp_size=2, tp_size=2) == [(0, 1), (2, 3)]
    assert shares(dp_size=3) == [0.9] * 3
    assert shares(dp_size=2, tp_size=2, mem_fraction_static=0.6) == [0.6] * 2
    assert chosen() == [()], "PyTorch's current one, which a program may have set"
    assert choose_gpus(ServerArgs(device="cpu", dp_size=9), index=8)[1] == ()


def test_too_few_gpus_are_an_error_that_names_the_flag_and_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"--dp-size 5: 5 GPUs are needed, and 4 can be used; --share-gpus puts"):
        chosen(dp_size=5)
    with pytest.raises(ValueError, match=r"3 engines of --tp-size 2: each rank .* 6 GPUs are needed, and 4 can"):
        chosen(dp_size=3, tp_size=2, share_gpus=True)
    with pytest.raises(ValueError, match=r"^--tp-size 8: each rank"):
        chosen(tp_size=8)


def test_engines_that_share_a_gpu_share_its_memory() -> None:
    assert chosen(dp_size=6, share_gpus=True) == [(0,), (1,), (2,), (3,), (0,), (1,)]
    assert shares(dp_size=6, share_gpus=True, mem_fraction_static=0.8) == [0.4, 0.4, 0.8, 0.8, 0.4, 0.4]


@pytest.mark.parametrize("num_gpus", [0], indirect=True)
def test_without_a_gpu_nothing_is_shared() -> None:
    with pytest.raises(ValueError, match="--dp-size 2: 2 GPUs are needed, and 0 can be used"):
        chosen(dp_size=2, share_gpus=True)
