"""Events of the cache: a reader who applies them knows at every moment what the cache holds."""

import json
import random
from collections import deque
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import zmq

from engine_driver import CLIENT, VOCAB_SIZE, Driver
from headwater.cache.host_tier import WritePolicy
from headwater.cache.namespace import Tier
from headwater.cache.storage.names import StorageNames
from headwater.engine.kv_events_publisher import END_OF_REPLAY, KvEventsPublisher, KvEventsSettings
from headwater.engine.kv_events_recorder import KvEventsRecorder
from headwater.http_api.control.cache_tree import tree_facts_with_blocks
from headwater.kv_events import (
    MEDIUMS,
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    KvEvent,
    decode_batch,
    short_hashes,
    stored_in_tree,
)
from headwater.messages.base import pack_ids
from headwater.messages.cache import CacheTree, DetachStorage, GetCacheTree
from headwater.messages.control import FlushCache
from headwater.messages.generation import Abort
from headwater.messages.weights import UpdateWeights
from headwater.storage.memory import MemoryBackend


class Reader:
    """The knowledge of a subscriber that reads only vLLM's fields."""

    def __init__(self) -> None:
        self.held: Held = {medium: {} for medium in MEDIUMS.values()}

    def apply(self, events: tuple[KvEvent, ...]) -> None:
        for event in events:
            if isinstance(event, AllBlocksCleared):
                for held in self.held.values():
                    held.clear()
            elif event.medium not in self.held:
                continue  # a store
            elif isinstance(event, BlockRemoved):
                for block in event.block_hashes:
                    del self.held[event.medium][block]
            else:
                self._store(event)

    def _store(self, event: BlockStored) -> None:
        size = event.block_size
        assert len(event.token_ids) == size * len(event.block_hashes)
        assert short_hashes(event.full_block_hashes) == event.block_hashes
        for index, block in enumerate(event.block_hashes):
            assert block not in self.held[event.medium], "stored twice"
            self.held[event.medium][block] = tuple(event.token_ids[index * size : (index + 1) * size])


Held = dict[str, dict[int, tuple[int, ...]]]  # medium -> hash -> tokens


def truth(driver: Driver, names: StorageNames) -> Held:
    tree = driver.parts.cache.tree
    found: Held = {medium: {} for medium in MEDIUMS.values()}
    for root in tree.roots.values():
        for node in tree.subtree(root):
            for tier in node.runs:
                for index, block in enumerate(short_hashes(names.hashes(tree, node))):
                    tokens = node.tokens[index * tree.page_size : (index + 1) * tree.page_size]
                    found[MEDIUMS[tier.name.lower()]][block] = tuple(tokens.tolist())
    return found


def observed(driver: Driver) -> tuple[KvEventsRecorder, StorageNames]:
    names = driver.parts.storage._names  # a node's hashes are computed once, for events and for the store
    recorder = KvEventsRecorder(driver.parts.cache.tree, names, epoch="e1")
    driver.parts.cache.observe(recorder)
    return recorder, names


@pytest.mark.parametrize("policy", list(WritePolicy))
@pytest.mark.parametrize("seed", range(6))
def test_a_reader_of_all_events_knows_what_the_cache_holds(policy: WritePolicy, seed: int) -> None:
    """Through splits, evictions, offloads, restores, flushes of every width and new weights."""
    source = random.Random(seed)
    driver = Driver(num_pages=30, num_host_pages=40, write_policy=policy, max_copy_polls=3)
    recorder, names = observed(driver)
    reader = Reader()
    stems = [[source.randrange(VOCAB_SIZE) for _ in range(24)] for _ in range(4)]
    for step in range(60):
        prompt = source.choice(stems)[: source.randrange(1, 25)] + [source.randrange(VOCAB_SIZE) for _ in range(8)]
        driver.generate(f"r{step}", prompt, 3, cache_salt=source.choice(["", "t"]))
        if source.random() < 0.15:
            scope = source.choice(
                [{}, {"cache_salt": "t"}, {"tiers": ("host",)}, {"prefix_ids": pack_ids(source.choice(stems)[:9])}]
            )
            driver.send(FlushCache(call_id=f"f{step}", mode="now", **scope))
        if source.random() < 0.03:
            driver.send(UpdateWeights(call_id=f"u{step}", path=f"w{step}"))
        for _ in range(source.randrange(1, 12)):
            driver.turn()
            reader.apply(recorder.take())
            assert reader.held == truth(driver, names)
    driver.finish()
    driver.settle()
    reader.apply(recorder.take())
    assert reader.held == truth(driver, names)
    assert driver.parts.cache.tier_pages[Tier.DEVICE].num_evicted > 0, "too little happened to show anything"


class Mirror:
    """A subscriber that loses batches, sees so in the numbers, and begins again from the tree."""

    def __init__(self, driver: Driver, publisher: KvEventsPublisher) -> None:
        self.reader = Reader()
        self.num_recoveries = 0
        self._driver = driver
        self._publisher = publisher
        self._expected = 0  # number of the next batch
        self._asked: str | None = None
        self._buffered: list[tuple[int, tuple[KvEvent, ...]]] = []

    def follow(self, source: random.Random) -> None:
        """Take in what was published, less what is lost on the way."""
        kept, self._publisher._kept = list(self._publisher._kept), deque()
        self._buffered += [(int.from_bytes(number, "big"), decode_batch(batch).events) for number, batch in kept]
        if source.random() < 0.1:
            self._buffered = self._buffered[1:]
        if self._asked is not None:
            self._recover()
        while self._asked is None and self._buffered:
            number, events = self._buffered[0]
            if number != self._expected:
                self._ask()
                return
            self.reader.apply(events)
            self._expected += 1
            del self._buffered[0]

    def _ask(self) -> None:
        self._asked = f"tree{self.num_recoveries}"
        self._driver.send(GetCacheTree(call_id=self._asked, depth=1, max_nodes=1, blocks=True))

    def _recover(self) -> None:
        answer = self._driver.replies.get(str(self._asked))
        if not isinstance(answer, CacheTree):
            return
        facts = json.loads(json.dumps(tree_facts_with_blocks(answer)))  # as HTTP brings it
        assert facts["epoch"] == "e1"
        self.reader = Reader()
        self.reader.apply(stored_in_tree(facts))
        self._expected = facts["next_event"]
        self._buffered = [(number, events) for number, events in self._buffered if number >= self._expected]
        self.num_recoveries += 1
        self._asked = None

    @property
    def is_asking(self) -> bool:
        return self._asked is not None

    @property
    def is_current(self) -> bool:
        """Whether it believes to know everything: a batch that is lost shows with the next."""
        return self._asked is None and self._expected == self._publisher._next_number


@pytest.mark.parametrize("policy", list(WritePolicy))
@pytest.mark.parametrize("seed", range(2))
def test_a_mirror_that_lost_events_recovers_from_the_tree_and_later_events(
    policy: WritePolicy, seed: int, tmp_path: Path
) -> None:
    """Exactly: what the tree holds already is not told again, and what changes in the same turn is told."""
    source = random.Random(seed)
    driver = Driver(num_pages=30, num_host_pages=40, write_policy=policy, max_copy_polls=3)
    recorder, names = observed(driver)
    publisher = KvEventsPublisher(recorder, KvEventsSettings(f"ipc://{tmp_path}/events", num_kept=10_000))
    driver.parts.loop._kv_events, driver.parts.loop._names = publisher, names
    mirror = Mirror(driver, publisher)
    stems = [[source.randrange(VOCAB_SIZE) for _ in range(24)] for _ in range(4)]
    num_compared = 0
    try:
        for step in range(100):
            prompt = source.choice(stems)[: source.randrange(1, 25)] + [source.randrange(VOCAB_SIZE) for _ in range(8)]
            driver.generate(f"r{step}", prompt, 3, cache_salt=source.choice(["", "t"]))
            if source.random() < 0.15:
                scope = source.choice([{}, {"cache_salt": "t"}, {"tiers": ("host",)}])
                driver.send(FlushCache(call_id=f"f{step}", mode="now", **scope))
            if source.random() < 0.03:
                driver.send(UpdateWeights(call_id=f"u{step}", path=f"w{step}"))
            if mirror.is_asking:  # what ends in the same turn, before the tree is read, publishes its pages
                driver.wire.inbound.insert(0, (CLIENT, Abort(call_id=f"a{step}", rid="", match="all")))
            for _ in range(source.randrange(1, 8)):
                driver.turn()
                mirror.follow(source)
                if mirror.is_current:
                    assert mirror.reader.held == truth(driver, names)
                    num_compared += 1
    finally:
        publisher.close()
    assert mirror.num_recoveries > 5 and num_compared > 100, "too little was lost to show anything"


def test_events_say_where_why_and_after_what() -> None:
    driver = Driver(num_pages=20, num_host_pages=40)
    recorder, _ = observed(driver)
    driver.finish(driver.generate("a", list(range(16)), 1, cache_salt="s"))
    driver.settle()
    events = recorder.take()
    stored = [event for event in events if isinstance(event, BlockStored)]
    assert [event.medium for event in stored] == ["GPU", "CPU_PINNED"]
    assert stored[0].cache_salt == "s" and stored[0].weights_id == "w0" and stored[0].parent_block_hash is None
    assert stored[0].extra_keys == [("s",), *[None] * (len(stored[0].block_hashes) - 1)], "vLLM's way to name the salt"
    driver.finish(driver.generate("b", [*range(16), *range(100, 108)], 1, cache_salt="s"))
    (more, *_) = [event for event in recorder.take() if isinstance(event, BlockStored)]
    assert more.parent_block_hash == stored[0].block_hashes[-1], "a reader could not put it in its place"
    assert more.extra_keys is None and more.cache_salt == "s"
    driver.settle()
    recorder.take()
    driver.send(FlushCache(call_id="f", cache_salt="s", tiers=("device",), mode="now"))
    driver.turn()
    removed = recorder.take()
    assert removed and all(isinstance(event, BlockRemoved) for event in removed)
    assert {(event.medium, event.reason) for event in removed} == {("GPU", "retired")}  # type: ignore[union-attr]
    driver.send(FlushCache(call_id="g", mode="now"))
    driver.turn()
    (cleared,) = recorder.take()
    assert isinstance(cleared, AllBlocksCleared) and cleared.tiers == ("device", "host")
    assert cleared.generation == driver.parts.cache.generation and cleared.epoch == "e1"


def test_a_flush_of_one_tier_names_the_blocks_while_the_other_has_some() -> None:
    """Every consumer drops all tiers at `AllBlocksCleared`."""
    driver = Driver(num_pages=20, num_host_pages=40)
    recorder, _ = observed(driver)
    driver.finish(driver.generate("a", list(range(16)), 1))
    driver.settle()
    on_host = [event for event in recorder.take() if isinstance(event, BlockStored)][-1].block_hashes
    driver.send(FlushCache(call_id="f", mode="now", tiers=("host",)))
    driver.turn()
    assert recorder.take() == (
        BlockRemoved(block_hashes=on_host, medium="CPU_PINNED", reason="retired", epoch="e1"),
    )
    driver.send(FlushCache(call_id="g", mode="now", tiers=("device",)))
    driver.turn()
    (cleared,) = recorder.take()
    assert isinstance(cleared, AllBlocksCleared), "nothing is left on any tier"


def test_salts_and_weights_have_blocks_of_their_own() -> None:
    """Equal hashes for equal tokens of two tenants would route one to the other's cache."""
    driver = Driver()
    recorder, _ = observed(driver)
    for salt in ("a", "b"):
        driver.finish(driver.generate(salt, list(range(16)), 1, cache_salt=salt))
    one, two = (event for event in recorder.take() if isinstance(event, BlockStored))
    assert not set(one.block_hashes) & set(two.block_hashes)


class StoreReader:
    """The knowledge of a subscriber about a store: hints, that may come twice."""

    def __init__(self) -> None:
        self.held: dict[int, tuple[str, int | None]] = {}  # hash -> salt, hash of the page before
        self.full: dict[int, bytes] = {}

    def apply(self, events: tuple[KvEvent, ...]) -> None:
        for event in events:
            if isinstance(event, AllBlocksCleared):
                self.held = {}
            elif event.medium != "EXTERNAL":
                continue
            elif isinstance(event, BlockRemoved) and event.reason == "cleared":
                salt = event.cache_salt
                self.held = {block: known for block, known in self.held.items() if salt not in (None, known[0])}
            elif isinstance(event, BlockRemoved):
                for block in event.block_hashes:
                    self.held.pop(block, None)
            else:
                self.full |= dict(zip(event.block_hashes, event.full_block_hashes, strict=True))
                for before, block in pairwise((event.parent_block_hash, *event.block_hashes)):
                    self.held[block] = (event.cache_salt, before)  # type: ignore[index]


@pytest.mark.parametrize("seed", range(6))
def test_a_reader_knows_what_was_written_to_the_store_and_what_was_flushed_there(seed: int) -> None:
    """With slow calls: a page is not told as stored after the flush that made it unreachable."""
    source = random.Random(seed)
    backend = MemoryBackend(capacity_bytes=1 << 22)
    driver = Driver(num_pages=40, num_host_pages=60, backend=backend, max_copy_polls=3)
    recorder, _ = observed(driver)
    reader = StoreReader()
    for step in range(50):
        driver.jobs.max_polls = source.choice([0, 3, 20])
        prompt = [source.randrange(VOCAB_SIZE) for _ in range(source.randrange(4, 30))]
        driver.generate(f"r{step}", prompt, 3, cache_salt=source.choice(["", "t"]))
        if source.random() < 0.1:
            salt = source.choice([None, "t"])
            tiers = source.choice([("storage",), ("device", "host", "storage")])
            driver.send(FlushCache(call_id=f"f{step}", mode="now", tiers=tiers, cache_salt=salt))
        driver.turn(source.randrange(1, 30))
        reader.apply(recorder.take())
    driver.finish(max_turns=20_000)
    driver.settle()
    driver.finish(driver.generate("last", [source.randrange(VOCAB_SIZE) for _ in range(40)], 3))
    driver.settle()
    reader.apply(recorder.take())
    held = {key.page for key in backend._pages if backend.exists([key])[0]}
    assert {reader.full[block] for block in reader.held} == held
    assert all(before is None or before in reader.full for _, before in reader.held.values())
    assert len(reader.held) >= 10, "the last request's at least"


def test_pages_that_the_store_has_lost_are_told_when_they_are_missed() -> None:
    backend = MemoryBackend(capacity_bytes=1 << 20)
    driver = Driver(num_pages=40, num_host_pages=60, backend=backend)
    recorder, _ = observed(driver)
    reader = StoreReader()
    prompt = list(range(60))
    driver.finish(driver.generate("a", prompt, 1))
    driver.settle()
    reader.apply(recorder.take())
    pages = sorted(backend._pages, key=lambda key: key.depth)
    blocks = short_hashes([key.page for key in pages])
    assert list(blocks) == list(reader.held) and len(blocks) == 15
    assert [before for _, before in reader.held.values()] == [None, *blocks[:-1]]
    backend.flip_bit(pages[9], 1000)
    driver.send(FlushCache(call_id="f", mode="now"))
    driver.turn()
    driver.finish(driver.generate("b", prompt, 1))
    removed = [event for event in recorder.take() if isinstance(event, BlockRemoved) and event.medium == "EXTERNAL"]
    assert removed == [BlockRemoved(block_hashes=(blocks[9],), medium="EXTERNAL", reason="damaged", epoch="e1")]
    driver.settle()
    driver.send(DetachStorage(call_id="d"))
    driver.turn()
    assert recorder.take()[-1] == store_cleared(driver)


def store_cleared(driver: Driver, *, cache_salt: str | None = None) -> BlockRemoved:
    return BlockRemoved(
        block_hashes=(), medium="EXTERNAL", reason="cleared", generation=driver.parts.cache.generation,
        cache_salt=cache_salt, epoch="e1",
    )  # fmt: skip


def test_a_flush_of_device_and_host_leaves_the_blocks_of_the_store_known() -> None:
    """`AllBlocksCleared` would take them from every router, though the pages are still there."""
    driver = Driver(num_pages=40, num_host_pages=60, backend=MemoryBackend(capacity_bytes=1 << 20))
    recorder, _ = observed(driver)
    driver.finish(driver.generate("a", list(range(16)), 1))
    driver.settle()
    stored = [event for event in recorder.take() if isinstance(event, BlockStored)]
    assert [event.medium for event in stored] == ["GPU", "CPU_PINNED", "EXTERNAL"]
    driver.send(FlushCache(call_id="f", mode="now", tiers=("device", "host")))
    driver.turn()
    removed = recorder.take()
    assert {event.medium: event.block_hashes for event in removed if isinstance(event, BlockRemoved)} == {
        "GPU": stored[0].block_hashes, "CPU_PINNED": stored[0].block_hashes
    }  # fmt: skip
    driver.send(FlushCache(call_id="g", mode="now", tiers=("device", "host", "storage")))
    driver.turn()
    (cleared,) = recorder.take()
    assert isinstance(cleared, AllBlocksCleared) and cleared.tiers == ("device", "host", "storage")


def test_a_flush_of_one_salt_in_the_store_is_one_event() -> None:
    """No engine knows all the blocks that other servers put there."""
    driver = Driver(num_pages=40, num_host_pages=60, backend=MemoryBackend(capacity_bytes=1 << 20))
    recorder, _ = observed(driver)
    driver.finish(driver.generate("a", list(range(16)), 1, cache_salt="t"))
    driver.settle()
    recorder.take()
    driver.send(FlushCache(call_id="f", mode="now", tiers=("storage",), cache_salt="t"))
    driver.turn()
    assert recorder.take() == (store_cleared(driver, cache_salt="t"),)


@pytest.fixture
def published(tmp_path: Path) -> Iterator[tuple[Driver, KvEventsPublisher, zmq.Socket, str]]:
    driver = Driver()
    recorder, _ = observed(driver)
    endpoint, replay = f"ipc://{tmp_path}/events", f"ipc://{tmp_path}/replay"
    settings = KvEventsSettings(endpoint, replay, num_kept=3, rank=2, topic="kv@here@model")
    publisher = KvEventsPublisher(recorder, settings)
    subscriber = zmq.Context.instance().socket(zmq.SUB)
    subscriber.setsockopt(zmq.RCVTIMEO, 3000)
    subscriber.setsockopt(zmq.LINGER, 0)
    subscriber.connect(endpoint)
    subscriber.subscribe(b"")
    assert publisher._socket.poll(0) == 0
    yield driver, publisher, subscriber, replay
    subscriber.close()
    publisher.close()


def replayed(endpoint: str, number: int) -> list[int]:
    """Sequence numbers that a replay from `number` brings, in the frames of the published batches."""
    request = zmq.Context.instance().socket(zmq.DEALER)
    request.setsockopt(zmq.RCVTIMEO, 3000)
    request.setsockopt(zmq.LINGER, 0)
    request.connect(endpoint)
    try:
        request.send_multipart((b"", number.to_bytes(8, "big")))
        numbers = []
        while True:
            delimiter, topic, got, batch = request.recv_multipart()
            assert delimiter == b""
            if got == END_OF_REPLAY:
                assert topic == b""
                return numbers
            assert topic == b"kv@here@model" and decode_batch(batch).events
            numbers.append(int.from_bytes(got, "big"))
    finally:
        request.close()


def test_batches_are_numbered_without_gaps_and_the_last_are_repeated(published) -> None:
    driver, publisher, subscriber, replay = published
    _await_subscription(publisher, subscriber, driver)
    numbers = []
    for index in range(5):
        driver.finish(driver.generate(f"r{index}", [index * 7 + token for token in range(12)], 1))
        publisher.publish()
        topic, number, batch = subscriber.recv_multipart()
        decoded = decode_batch(batch)
        assert topic == b"kv@here@model" and decoded.data_parallel_rank == 2 and decoded.events[0].epoch == "e1"
        numbers.append(int.from_bytes(number, "big"))
    assert numbers == list(range(numbers[0], numbers[0] + 5))
    assert replayed(replay, 0) == numbers[-3:], "no more than is kept"
    assert replayed(replay, numbers[-1]) == numbers[-1:]
    assert replayed(replay, numbers[-1] + 1) == []


def _await_subscription(publisher: KvEventsPublisher, subscriber: zmq.Socket, driver: Driver) -> None:
    """A subscription reaches the publisher a little later; what is sent before is missed."""
    for attempt in range(100):
        driver.finish(driver.generate(f"probe{attempt}", [500 + attempt] * 8, 1))
        publisher.publish()
        if subscriber.poll(30):
            while subscriber.poll(0):
                subscriber.recv_multipart()
            return
    raise AssertionError("the subscriber hears nothing")


def test_a_turn_in_which_nothing_happened_sends_nothing(published) -> None:
    _, publisher, _, replay = published
    publisher.publish()
    assert replayed(replay, 0) == []


def test_a_malformed_request_for_a_replay_does_not_end_the_service(published) -> None:
    _, _, _, replay = published
    request = zmq.Context.instance().socket(zmq.DEALER)
    request.connect(replay)
    request.send_multipart((b"", b"abc"))
    assert replayed(replay, 0) == []
    request.close(linger=0)


def test_an_endpoint_that_is_taken_names_the_flag(tmp_path: Path) -> None:
    driver = Driver()
    recorder, _ = observed(driver)
    with pytest.raises(ValueError, match="--kv-events-endpoint"):
        KvEventsPublisher(recorder, KvEventsSettings(f"ipc://{tmp_path}/none/such"))
