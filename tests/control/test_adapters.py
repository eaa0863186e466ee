"""LoRA adapters while the engine serves: load, reload, unload, and what each leaves of the cache."""

from engine_driver import VOCAB_SIZE, Driver
from headwater.engine.report import adapter_states
from headwater.messages.adapters import AdapterLoaded, AdapterUnloaded, LoadAdapter, UnloadAdapter
from headwater.messages.base import pack_ids
from headwater.messages.cache import CacheTree, GetCacheTree, PinPrefix, Pins
from headwater.messages.control import Failed, FlushCache, FlushResult, PauseGeneration
from headwater.messages.generation import Grammar
from headwater.scheduling.adapters import AdapterBoard
from headwater.simulation.fakes.canary import expected_tokens, with_adapter
from headwater.simulation.fakes.grammar import FakeGrammar

PROMPT = list(range(20))


def text_of(adapter: str, num_tokens: int = 6) -> list[int]:
    return expected_tokens(PROMPT, num_tokens, VOCAB_SIZE, namespace=with_adapter("", adapter))


def load(driver: Driver, name: str, path: str, *, call_id: str = "load", **fields: object) -> AdapterLoaded | Failed:
    driver.send(LoadAdapter(call_id=call_id, name=name, path=path, **fields))  # type: ignore[arg-type]
    for _ in range(8):
        driver.turn()
        if call_id in driver.replies:
            break
    return driver.replies.pop(call_id)  # type: ignore[return-value]


def cached_tokens(driver: Driver, adapter: str) -> int:
    tree = driver.parts.cache.tree
    roots = [root for namespace, root in tree.roots.items() if namespace.adapter == adapter]
    return sum(len(node.tokens) for root in roots for node in tree.subtree(root))


def test_each_adapter_has_a_cache_of_its_own():
    driver = Driver()
    load(driver, "one", "a1")
    load(driver, "two", "a2")
    for name, content in (("", ""), ("one", "a1"), ("two", "a2")):
        answer = driver.generate(f"r{content}", PROMPT, 6, lora_name=name)
        driver.finish(answer)
        assert answer.tokens == text_of(content)
        assert answer.meta.cached_device == 0, "nothing of another adapter was matched"
    again = driver.generate("again", PROMPT, 6, lora_name="one")
    driver.finish(again)
    assert again.meta.cached_device >= 16


def test_an_adapter_says_how_many_of_its_requests_run_and_how_many_wait():
    driver = Driver(max_running=2)
    load(driver, "one", "a1")
    load(driver, "two", "a2")
    for number in range(5):
        driver.generate(f"r{number}", PROMPT, 50, lora_name="one")
    driver.turn(3)
    states = {state.name: state for state in adapter_states(driver.parts.scheduler)}
    assert {name: (state.num_running, state.num_waiting) for name, state in states.items()} == {
        "one": (2, 3),
        "two": (0, 0),
    }
    driver.finish()


def test_a_reload_retires_the_old_content_and_nothing_else():
    driver = Driver()
    load(driver, "one", "a1")
    load(driver, "two", "a2")
    for name in ("", "one", "two"):
        driver.finish(driver.generate(f"r{name}", PROMPT, 6, lora_name=name))
    before = {adapter: cached_tokens(driver, adapter) for adapter in ("", "a1", "a2")}
    assert all(before.values())
    answer = load(driver, "one", "a3", load_inplace=True)
    assert isinstance(answer, AdapterLoaded)
    assert answer.freed["device"].pages * driver.shape.page_size == before["a1"]
    assert [cached_tokens(driver, adapter) for adapter in ("", "a1", "a2")] == [before[""], 0, before["a2"]]
    after = driver.generate("after", PROMPT, 6, lora_name="one")
    driver.finish(after)
    assert (after.tokens, after.meta.cached_device) == (text_of("a3"), 0)


def test_a_running_request_finishes_on_the_content_that_it_began_with():
    driver = Driver(is_async=True)
    load(driver, "one", "a1")
    running = driver.generate("running", PROMPT, 30, lora_name="one")
    driver.turn(4)
    answer = load(driver, "one", "a2", load_inplace=True)
    assert isinstance(answer, AdapterLoaded) and answer.num_kept == 1
    assert driver.parts.scheduler.adapters.num_retired == 1
    new = driver.generate("new", PROMPT, 6, lora_name="one")
    driver.finish(running, new)
    assert running.tokens == text_of("a1", 30)
    assert new.tokens == text_of("a2")
    assert sorted(driver.runner.adapters.by_slot.values()) == ["a2"], "the slot of the old content is free"
    assert cached_tokens(driver, "a1") == 0, "and its pages were not published"


def test_a_request_that_waits_takes_the_new_content():
    driver = Driver()
    load(driver, "one", "a1")
    driver.send(PauseGeneration(call_id="pause", mode="in_place"))
    driver.turn()
    waiting = driver.generate("waiting", PROMPT, 6, lora_name="one")
    driver.turn(2)
    load(driver, "one", "a2", load_inplace=True)
    driver.parts.orders.is_paused = False
    driver._checks.control.is_paused = False
    driver.finish(waiting)
    assert waiting.tokens == text_of("a2")


def test_an_unloaded_adapter_is_gone_for_new_requests_only():
    driver = Driver(max_running=1)
    load(driver, "one", "a1")
    running = driver.generate("running", PROMPT, 30, lora_name="one")
    driver.turn(3)
    waiting = driver.generate("waiting", PROMPT, 6, lora_name="one")
    driver.turn(2)
    driver.send(UnloadAdapter(call_id="unload", name="one"))
    driver.turn(2)
    answer = driver.replies["unload"]
    assert isinstance(answer, AdapterUnloaded)
    assert (answer.num_kept, answer.num_ended) == (1, 1)
    late = driver.generate("late", PROMPT, 6, lora_name="one")
    driver.finish(running, waiting, late)
    assert running.tokens == text_of("a1", 30)
    assert [each.finish.status for each in (waiting, late)] == [404, 404]
    assert driver.runner.adapters.by_slot == {}


def test_an_unload_ends_what_waits_for_its_grammar_or_its_pages():
    """These are in no queue yet, and would begin with an adapter that nobody has loaded."""
    driver = Driver(num_pages=24, num_host_pages=40, max_copy_polls=20, max_running=1)
    load(driver, "one", "a1")
    driver.finish(driver.generate("first", PROMPT, 1, lora_name="one"))
    driver.settle()
    driver.finish(driver.generate("other", list(range(100, 180)), 1))  # what has been copied to the host is evicted
    driver.copier.max_polls = driver.engine.grammar_jobs.max_polls = 20
    restoring = driver.generate("restoring", PROMPT, 6, lora_name="one")
    compiling = driver.generate("compiling", PROMPT, 6, lora_name="one", grammar=Grammar(FakeGrammar(1, 3).text))
    driver.turn()
    scheduler = driver.parts.scheduler
    assert (len(scheduler.loading), len(scheduler.grammars), len(scheduler.waiting)) == (1, 1, 0)
    driver.send(UnloadAdapter(call_id="unload", name="one"))
    driver.turn(2)
    assert driver.replies["unload"].num_ended == 2
    assert [each.finish and each.finish.status for each in (restoring, compiling)] == [404, 404]


def test_the_same_content_again_changes_nothing():
    driver = Driver()
    load(driver, "one", "a1")
    driver.finish(driver.generate("first", PROMPT, 6, lora_name="one"))
    answer = load(driver, "one", "a1", load_inplace=True)
    assert isinstance(answer, AdapterLoaded) and not answer.is_changed
    again = driver.generate("again", PROMPT, 6, lora_name="one")
    driver.finish(again)
    assert again.meta.cached_device >= 16


def test_two_names_of_one_content_share_it():
    """A reload of one of the names must not take the pages that requests of the other match."""
    driver = Driver()
    load(driver, "one", "a1")
    load(driver, "same", "a1")
    driver.finish(driver.generate("first", PROMPT, 6, lora_name="one"))
    load(driver, "one", "a2", load_inplace=True)
    again = driver.generate("again", PROMPT, 6, lora_name="same")
    driver.finish(again)
    assert (again.tokens, again.meta.cached_device >= 16) == (text_of("a1"), True)


def test_refusals_change_nothing():
    driver = Driver()
    load(driver, "one", "a1")
    cases = [
        (load(driver, "one", "a2"), 400, "is loaded already; load_inplace replaces it"),
        (load(driver, "two", "corrupt"), 400, "corrupt is broken"),
        (load(driver, "one", "a2", load_inplace=True, only_adapter_id="a9"), 409, "adapter a2, not a9"),
    ]
    for answer, status, words in cases:
        assert isinstance(answer, Failed) and answer.status == status and words in answer.message
    loaded = driver.parts.scheduler.adapters.by_name
    assert {name: it.content.adapter_id for name, it in loaded.items()} == {"one": "a1"}


def test_a_reload_without_a_free_place_waits_for_nobody():
    """Every place is taken, one of them by an old content that a request still has: 409, and the name keeps it."""
    driver = Driver(is_async=True)
    for number in range(4):
        load(driver, f"n{number}", f"a{number}")
    idle = load(driver, "n0", "b0", load_inplace=True)
    assert isinstance(idle, AdapterLoaded), "no request has the old content: it makes room for the new one"
    running = driver.generate("running", PROMPT, 40, lora_name="n0")
    driver.turn(4)
    refused = load(driver, "n0", "c0", load_inplace=True)
    assert isinstance(refused, Failed) and refused.status == 409
    assert "all 4 places for adapters are taken" in refused.message
    driver.finish(running)
    assert running.tokens == text_of("b0", 40)
    assert isinstance(load(driver, "n0", "c0", load_inplace=True), AdapterLoaded)


def ask(driver: Driver, message: object, *, turns: int = 3) -> object:
    driver.send(message)
    driver.turn(turns)
    return driver.replies.pop(message.call_id)  # type: ignore[attr-defined]


def loaded_and_cached() -> Driver:
    """Two adapters and the base model have computed the same prompt."""
    driver = Driver()
    load(driver, "one", "a1")
    load(driver, "two", "a2")
    for name in ("", "one", "two"):
        driver.finish(driver.generate(f"r{name}", PROMPT, 6, lora_name=name))
    return driver


def test_a_flush_may_be_limited_to_an_adapter():
    driver = loaded_and_cached()
    before = cached_tokens(driver, "a1")
    preview = ask(driver, FlushCache(call_id="dry", lora_name="one", dry_run=True))
    assert isinstance(preview, FlushResult)
    assert preview.freed["device"].pages * driver.shape.page_size == before == cached_tokens(driver, "a1")
    answer = ask(driver, FlushCache(call_id="one", lora_name="one"))
    assert isinstance(answer, FlushResult) and answer.success and answer.freed == preview.freed
    assert [bool(cached_tokens(driver, each)) for each in ("", "a1", "a2")] == [True, False, True]
    ask(driver, FlushCache(call_id="base", lora_name=""))
    assert [bool(cached_tokens(driver, each)) for each in ("", "a2")] == [False, True]


def test_a_flush_that_waits_means_the_content_of_that_moment():
    driver = loaded_and_cached()
    running = driver.generate("running", list(range(40, 60)), 30, lora_name="two")
    driver.turn(2)
    driver.send(FlushCache(call_id="flush", lora_name="one", timeout_s=20.0))
    driver.turn()
    load(driver, "one", "a3", load_inplace=True)
    driver.finish(driver.generate("new", PROMPT, 6, lora_name="one"))
    assert cached_tokens(driver, "a3")
    driver.finish(running)
    driver.turn(3)
    assert driver.replies.pop("flush").success
    assert not cached_tokens(driver, "a3") and cached_tokens(driver, "a2")


def test_a_pin_of_an_adapter_ends_with_its_content():
    driver = loaded_and_cached()
    pins = ask(driver, PinPrefix(call_id="pin", prompt_ids=pack_ids(PROMPT), ttl_s=100.0, lora_name="one"))
    assert isinstance(pins, Pins)
    assert (pins.items[0].adapter_id, pins.items[0].num_tokens) == ("a1", 20)
    ask(driver, FlushCache(call_id="other", lora_name="two"))
    assert driver.parts.pinning.num_pins == 1, "a flush of another adapter leaves it"
    load(driver, "one", "a3", load_inplace=True)
    driver.turn(2)
    assert driver.parts.pinning.num_pins == 0


def test_the_tree_may_be_limited_to_an_adapter():
    driver = loaded_and_cached()
    for name, contents in ((None, {"", "a1", "a2"}), ("two", {"a2"}), ("", {""})):
        tree = ask(driver, GetCacheTree(call_id="tree", lora_name=name, blocks=True))
        assert isinstance(tree, CacheTree)
        assert {root.adapter_id for root in tree.roots} == contents
        assert {tree.roots[block.root].adapter_id for block in tree.blocks} == contents


def test_a_scope_that_is_not_loaded_is_refused_by_name():
    """An ignored name would flush everything."""
    driver = loaded_and_cached()
    calls = [
        FlushCache(call_id="a", lora_name="three"),
        PinPrefix(call_id="b", prompt_ids=pack_ids(PROMPT), ttl_s=1.0, lora_name="three"),
        GetCacheTree(call_id="c", lora_name="three"),
    ]
    for call in calls:
        failed = ask(driver, call)
        assert isinstance(failed, Failed) and (failed.status, failed.param) == (404, "lora_path")
    failed = ask(driver, FlushCache(call_id="d", lora_name="one", tiers=("device", "storage")))
    assert isinstance(failed, Failed) and failed.status == 400
    assert cached_tokens(driver, "a1")


def test_what_another_name_still_means_leaves_no_room_for_what_replaces_it():
    adapters = AdapterBoard(2)
    for name, content in (("one", "a1"), ("also one", "a1"), ("two", "a2")):
        adapters.put(name, "", adapter_id=content, rank=8, num_bytes=1)
    shared, alone = adapters.find("one"), adapters.find("two")
    assert not adapters.has_room("a3", replaces=shared, in_use=False)
    assert not adapters.has_room("a3", replaces=None, in_use=False)
    assert adapters.has_room("a3", replaces=alone, in_use=False)
    assert not adapters.has_room("a3", replaces=alone, in_use=True)
