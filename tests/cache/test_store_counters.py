"""What the cache knows of a store's counters: pages are marked with them, and what is unknown is asked for."""

import numpy as np
import pytest
from test_tiers_stateful import FINGERPRINT, HOST, PAGE, STEMS, STORAGE, TiersMachine

from headwater.cache.namespace import Namespace, Scope
from headwater.cache.storage.names import StorageNames

NS = Namespace("", "", "", "w")


@pytest.fixture
def machine() -> TiersMachine:
    machine = TiersMachine()
    machine.serve(tokens=STEMS[0], salt="")
    machine.quiet(rounds=1)
    return machine


def test_a_new_store_is_asked_about_the_namespaces_that_are_here(machine):
    """Pages of the very next request can be stored."""
    machine.attach(1)
    machine.turn(count=4)
    assert machine.cache.lower.storage.known_generations(NS) == (0, 0, 0, 0)


def test_a_short_prompt_asks_anew_when_the_counters_were_forgotten(machine):
    storage, short = machine.cache.lower.storage, np.array([5], dtype=np.int32)
    for _ in range(2):
        storage.generations.forget(NS)
        question = storage.prefetch(NS, short, num_known_tokens=0)
        assert storage.prefetch(NS, short, num_known_tokens=0) is question and not question.is_done, "asked once"
        machine.turn(count=4)
        assert question.is_done and storage.known_generations(NS) is not None


def test_what_was_read_before_a_flush_is_not_believed_while_the_store_has_yet_to_acknowledge_it(machine):
    storage = machine.cache.lower.storage
    machine.stores[0].refuses_flushes = True
    machine.retire(salt=None, prefix=None, tiers=frozenset({STORAGE}))
    storage.generations.heard(NS, (0, 0, 0, 0))
    assert storage.known_generations(NS) is None


def test_pages_that_came_from_the_store_can_be_stored_again(machine):
    """By another server's flush, or for lack of room, they may be gone there meanwhile."""
    machine.find_in_the_store(tokens=STEMS[0], salt="")
    machine.turn(count=12)
    root = machine.cache.tree.roots[NS]
    read = [node.runs[HOST] for node in machine.cache.tree.subtree(root) if HOST in node.runs]
    assert read and all(run.generations == (0, 0, 0, 0) for run in read)


def test_a_request_that_begins_further_down_the_text_does_not_wait_for_what_begins_above(machine):
    """The prefetch above brings pages that this one has; the pages that it lacks may not be among them."""
    storage, tokens = machine.cache.lower.storage, np.array([7] * 12, dtype=np.int32)
    above = storage.prefetch(NS, tokens[: 4 * PAGE], num_known_tokens=0)
    below = storage.prefetch(NS, tokens[: 4 * PAGE], num_known_tokens=2 * PAGE)
    assert above is not below and below.first_page == 2


def test_counters_that_another_server_has_raised_are_forgotten_when_the_store_refuses_a_page(machine):
    """So that the next request asks for them, and its pages can be stored."""
    machine.stores[0].raise_generation(StorageNames(FINGERPRINT).scope(Scope(tiers=frozenset({STORAGE}))))
    machine.end(machine.acquire(tokens=STEMS[2], salt="", no_store=False, prefetches=False))
    assert machine.cache.lower.storage.known_generations(NS) is None
    machine.end(machine.acquire(tokens=STEMS[1], salt="", no_store=False, prefetches=True))
    assert machine.cache.lower.storage.known_generations(NS) == (1, 0, 0, 0)
