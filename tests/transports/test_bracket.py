"""The rules of brackets: what joins what, and what ends them."""

import pytest

from headwater.devices.safetensors_header import StoredTensor
from headwater.messages.weights import Parameters
from headwater.transports.bracket import Phase, Transfer, TransferRefused, Transfers

MODEL = Parameters(call_id="", shapes={"a": (2,), "b": (3, 4)}, ignored_suffixes=("inv_freq",))
A, B = StoredTensor("F32", (2,), 0, 8), StoredTensor("BF16", (3, 4), 0, 24)


class Driver:
    def __init__(self) -> None:
        self.dropped: list[Transfer] = []
        names = iter(range(100))
        self.transfers = Transfers(new_id=lambda: f"t{next(names)}", drop=self.dropped.append)

    def bucket(
        self, tensors: dict[str, StoredTensor], *, now_s: float = 0.0, transfer_id: str | None = None
    ) -> Transfer:
        transfer = self.transfers.bucket_begins(transfer_id, deadline_s=9.0, now_s=now_s)
        self.transfers.bucket_ends(transfer, tensors, MODEL)
        return transfer


@pytest.fixture
def driver() -> Driver:
    return Driver()


def test_buckets_of_a_bracket_are_one_transfer(driver: Driver) -> None:
    begun = driver.transfers.begin(deadline_s=10.0, now_s=0.0)
    assert driver.bucket({"a": A}) is begun
    assert driver.bucket({"b": B}, transfer_id=begun.transfer_id) is begun
    assert begun.phase is Phase.RECEIVING
    ended = driver.transfers.end(None, now_s=9.0)
    assert ended is begun and ended.phase is Phase.SEALED
    assert ended.tensors == {"a": (2,), "b": (3, 4)}
    assert driver.transfers.open is None
    assert not driver.dropped


def test_without_a_bracket_each_bucket_is_its_own(driver: Driver) -> None:
    assert driver.bucket({"a": A}) is not driver.bucket({"b": B})


def test_a_second_begin_is_refused_and_harms_nothing(driver: Driver) -> None:
    driver.transfers.begin(deadline_s=10.0, now_s=0.0)
    driver.bucket({"a": A})
    with pytest.raises(TransferRefused, match="a bracket is open"):
        driver.transfers.begin(deadline_s=10.0, now_s=1.0)
    assert driver.transfers.end(None, now_s=2.0).num_buckets == 1


def test_an_overdue_bracket_is_dropped_and_its_late_buckets_are_refused(driver: Driver) -> None:
    """A late bucket would otherwise be swapped in alone: half an update."""
    begun = driver.transfers.begin(deadline_s=10.0, now_s=0.0)
    driver.bucket({"a": A})
    assert driver.transfers.next_look_s == 10.0
    driver.transfers.tick(10.0)
    assert driver.dropped == [begun]
    for _ in range(2):
        with pytest.raises(TransferRefused, match="not ended by its deadline"):
            driver.bucket({"b": B}, now_s=11.0)
    with pytest.raises(TransferRefused, match="not ended by its deadline"):
        driver.transfers.end(None, now_s=11.0)
    driver.bucket({"b": B}, now_s=12.0)  # its caller knows by now


def test_a_new_begin_forgets_the_overdue_one_but_not_its_name(driver: Driver) -> None:
    old = driver.transfers.begin(deadline_s=10.0, now_s=0.0)
    new = driver.transfers.begin(deadline_s=30.0, now_s=20.0)
    with pytest.raises(TransferRefused, match="of another caller"):
        driver.bucket({"a": A}, now_s=21.0, transfer_id=old.transfer_id)
    assert driver.bucket({"a": A}, now_s=21.0) is new


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"c": A}, "no tensor 'c'"),
        ({"a": B}, r"shape \[3, 4\], the model's has \[2\]"),
        ({"a": StoredTensor("I32", (2,), 0, 8)}, "of type I32"),
        ({}, "no tensor"),
    ],
)
def test_a_refused_bucket_breaks_its_bracket(driver: Driver, tensors: dict[str, StoredTensor], reason: str) -> None:
    driver.transfers.begin(deadline_s=10.0, now_s=0.0)
    driver.bucket({"a": A})
    with pytest.raises(TransferRefused, match=reason):
        driver.bucket(tensors)
    with pytest.raises(TransferRefused, match="cannot be completed"):
        driver.bucket({"a": A})
    with pytest.raises(TransferRefused, match="cannot be completed"):
        driver.transfers.end(None, now_s=1.0)
    assert len(driver.dropped) == 1
    driver.transfers.begin(deadline_s=10.0, now_s=2.0)


def test_a_torn_bucket_breaks_its_bracket(driver: Driver) -> None:
    driver.transfers.begin(deadline_s=10.0, now_s=0.0)
    transfer = driver.transfers.bucket_begins(None, deadline_s=10.0, now_s=0.0)
    driver.transfers.bucket_fails(transfer, "cut off")
    with pytest.raises(TransferRefused, match="cut off"):
        driver.transfers.end(None, now_s=1.0)


def test_a_bracket_ends_after_the_buckets_on_their_way(driver: Driver) -> None:
    driver.transfers.begin(deadline_s=10.0, now_s=0.0)
    arriving = driver.transfers.bucket_begins(None, deadline_s=10.0, now_s=0.0)
    with pytest.raises(TransferRefused, match="1 buckets are still arriving"):
        driver.transfers.end(None, now_s=1.0)
    driver.transfers.bucket_ends(arriving, {"a": A}, MODEL)
    assert driver.transfers.end(None, now_s=1.0).num_buckets == 1


def test_a_bucket_that_arrives_after_an_abort_is_dropped(driver: Driver) -> None:
    begun = driver.transfers.begin(deadline_s=10.0, now_s=0.0)
    arriving = driver.transfers.bucket_begins(None, deadline_s=10.0, now_s=0.0)
    assert driver.transfers.abort(None, now_s=1.0) is begun
    with pytest.raises(TransferRefused, match="nothing of it was kept"):
        driver.transfers.bucket_ends(arriving, {"a": A}, MODEL)
    assert driver.transfers.abort(None, now_s=1.0) is None


def test_a_label_waits_for_the_end_and_is_not_set_alone_after_the_deadline(driver: Driver) -> None:
    assert not driver.transfers.take_label("7", aborts_all=True, now_s=0.0)
    begun = driver.transfers.begin(deadline_s=10.0, now_s=0.0)
    assert driver.transfers.take_label("8", aborts_all=True, now_s=1.0)
    assert (begun.weight_version, begun.aborts_all) == ("8", True)
    with pytest.raises(TransferRefused, match="not ended by its deadline"):
        driver.transfers.take_label("9", aborts_all=False, now_s=11.0)


def test_an_empty_bracket_and_an_end_without_one_are_refused(driver: Driver) -> None:
    with pytest.raises(TransferRefused, match="no bracket is open"):
        driver.transfers.end(None, now_s=0.0)
    driver.transfers.begin(deadline_s=10.0, now_s=0.0)
    with pytest.raises(TransferRefused, match="is empty"):
        driver.transfers.end(None, now_s=0.0)


def test_names_that_checkpoints_carry_along_are_ignored(driver: Driver) -> None:
    driver.bucket({"a": A, "model.rotary.inv_freq": B})


def test_two_labels_of_a_bracket_end_all_requests_if_either_asks_for_it(driver: Driver) -> None:
    begun = driver.transfers.begin(deadline_s=10.0, now_s=0.0)
    driver.transfers.take_label("8", aborts_all=True, now_s=1.0)
    driver.transfers.take_label("9", aborts_all=False, now_s=2.0)
    assert (begun.weight_version, begun.aborts_all) == ("9", True)


def test_an_abort_takes_note_of_an_overdue_bracket(driver: Driver) -> None:
    """Its caller knows now: later buckets without a bracket are updates of their own again."""
    driver.transfers.begin(deadline_s=10.0, now_s=0.0)
    assert driver.transfers.abort(None, now_s=11.0) is None
    assert not driver.bucket({"a": A}, now_s=12.0).is_bracket
