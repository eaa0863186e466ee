"""Requests with grammars: compiled before admission, without blocking others, bounded, cached, ended with reasons."""

import numpy as np
import pytest
from scheduler_steps import CLIENT, Steps, message

from headwater.clock import ManualClock
from headwater.messages.generation import Grammar
from headwater.scheduling.grammar_masks import MaskBuffer
from headwater.scheduling.grammar_queue import GrammarLimits, GrammarQueue
from headwater.scheduling.limits import Admission
from headwater.scheduling.plan import StepPlan
from headwater.simulation.fakes.grammar import BROKEN, FakeCompiler, FakeGrammar, FakeMatcher, tokens_of
from headwater.simulation.fakes.jobs import FakeJobRunner

VOCAB_SIZE, EOS = 1000, 999
TEXT = FakeGrammar(seed=1, num_tokens=3).text


class GrammarSteps(Steps):
    """`Steps` with a fake compiler, whose jobs end after `jobs.max_polls` polls at most."""

    def __init__(self, *, limits: GrammarLimits | None = None, hangs: bool = False, **kwargs: object) -> None:
        self.jobs = FakeJobRunner()
        self.jobs.hang_rate = float(hangs)
        clock = ManualClock()
        self.compiler = FakeCompiler(vocab_size=VOCAB_SIZE, end_ids=frozenset({EOS}))
        self.queue = GrammarQueue(self.compiler, clock=clock, jobs=self.jobs, limits=limits)
        super().__init__(grammars=self.queue, eos=(EOS,), vocab_size=VOCAB_SIZE, **kwargs)
        self.clock = clock

    def ask(
        self,
        rid: str = "a",
        *args: int,
        text: str = TEXT,
        begins_after: tuple[int, ...] = (),
        opens_with: int | None = None,
        begins_within: int | None = None,
        **fields,
    ) -> None:
        grammar = Grammar(text, begins_after=begins_after, opens_with=opens_with, begins_within=begins_within)
        self.scheduler.add(message(rid, *args, grammar=grammar, **fields), client=CLIENT)

    @property
    def first_token(self) -> int:
        """One that the grammar `TEXT` begins with."""
        return FakeMatcher(FakeGrammar.parse(TEXT), self.compiler).allowed[0]

    def allowed(self, plan: StepPlan) -> list[list[int]]:
        """By grammar row."""
        return [tokens_of(words, VOCAB_SIZE) for words in self.scheduler.masks.fill(plan).words]

    def matcher(self, rid: str = "a") -> FakeMatcher:
        state = next(r.grammar for r in self.scheduler.running if r.rid == rid)
        assert state is not None and isinstance(state.matcher, FakeMatcher)
        return state.matcher


def test_a_request_waits_for_its_grammar_and_blocks_no_other() -> None:
    steps = GrammarSteps(hangs=True)
    steps.ask("slow")
    steps.add("fast")
    plan = steps.step()
    assert plan.num_rows == 1 and steps.running == ["fast"]
    assert steps.scheduler.in_flight() == {"running": 1, "grammar": 1}
    steps.jobs.release_hanging()
    steps.step(token=steps.first_token)
    assert steps.running == ["fast", "slow"] and "grammar" not in steps.scheduler.in_flight()


def test_many_that_compile_do_not_fill_the_part_of_the_queue_that_is_looked_at() -> None:
    steps = GrammarSteps(hangs=True, max_queued=1000, max_running=100)
    for number in range(100):
        steps.ask(f"slow{number}")
    steps.add("fast")
    steps.step()
    assert steps.running == ["fast"]


def test_compiling_requests_count_in_the_bound_of_the_queue() -> None:
    steps = GrammarSteps(hangs=True, max_queued=2)
    for rid in "abc":
        steps.ask(rid)
    assert steps.finish_of("c").status == 429


def test_a_held_engine_does_not_count_them_as_blockers() -> None:
    """A flush with `hold` would wait for requests that its own hold keeps out."""
    steps = GrammarSteps(hangs=True)
    steps.ask()
    for admission in (Admission(may_start=False), Admission(may_run=False)):
        steps.scheduler.admission = admission
        assert steps.scheduler.in_flight() == {}
    steps.scheduler.admission = Admission()
    assert steps.scheduler.in_flight() == {"grammar": 1}


def test_what_is_no_grammar_is_a_400_with_the_reason() -> None:
    steps = GrammarSteps()
    steps.ask(text=BROKEN)
    assert steps.plan() is None
    end = steps.finish_of()
    assert (end.type, end.status, end.err_type) == ("abort", 400, "invalid_request_error")
    assert "the grammar cannot be used: " in end.message
    assert not steps.scheduler.in_flight() and steps.queue.counters.grammars_failed == 1
    assert steps.scheduler.counters.num_refused == 1


def test_a_compilation_that_takes_too_long_is_a_400_for_all_its_requests() -> None:
    steps = GrammarSteps(hangs=True, limits=GrammarLimits(compile_timeout_s=2.0))
    steps.ask("a")
    steps.clock.advance(1.5)
    steps.ask("b")
    steps.plan()
    assert steps.finish_of("a") is None
    steps.clock.advance(0.6)
    steps.plan()
    for rid in "ab":
        assert (steps.finish_of(rid).status, "longer than 2 s" in steps.finish_of(rid).message) == (400, True)
    assert not steps.jobs.open_jobs, "given up, so that a stop does not wait for it"
    steps.jobs.release_hanging()  # the late thread changes nothing
    steps.plan()
    assert steps.queue.num_cached == 0 and not steps.queue.needs_polling


def test_the_first_grammar_has_its_time_after_the_vocabulary_was_read() -> None:
    """Reading a large vocabulary takes seconds on a busy machine."""
    steps = GrammarSteps(hangs=True, limits=GrammarLimits(compile_timeout_s=2.0))
    steps.compiler.is_ready = False
    steps.ask()
    for _ in range(3):
        steps.clock.advance(1.9)
        steps.plan()
    steps.compiler.is_ready = True
    steps.clock.advance(1.9)
    steps.plan()
    assert steps.finish_of() is None
    steps.clock.advance(0.2)
    steps.plan()
    assert steps.finish_of().status == 400


def test_a_long_text_is_refused_without_a_compilation() -> None:
    steps = GrammarSteps(limits=GrammarLimits(max_bytes=10))
    steps.ask()
    assert steps.finish_of().status == 400 and "--grammar-max-bytes (10)" in steps.finish_of().message
    assert not steps.jobs.open_jobs


def test_an_engine_without_a_compiler_refuses_grammars() -> None:
    steps = Steps()
    steps.scheduler.add(message(grammar=Grammar(text=TEXT)), client=CLIENT)
    assert steps.finish_of().status == 400


def test_an_aborted_request_stops_waiting_and_its_grammar_is_kept_for_the_next() -> None:
    steps = GrammarSteps(hangs=True)
    steps.ask()
    assert steps.scheduler.abort("a", match="exact", message="aborted") == 1
    assert not steps.scheduler.in_flight() and steps.queue.needs_polling
    steps.jobs.release_hanging()
    assert steps.plan() is None and steps.queue.num_cached == 1


def test_requests_of_one_grammar_share_its_compilation_but_no_place() -> None:
    steps = GrammarSteps()
    for rid in "ab":
        steps.ask(rid)
    steps.step(token=steps.first_token)
    steps.ask("c")
    assert steps.queue.counters.grammars_compiled == 1 and steps.queue.counters.grammar_hits == 1
    plan = steps.plan()
    assert steps.running == ["a", "b", "c"]
    found = steps.allowed(plan)
    assert found[0] == found[1] != found[2]


def test_the_cache_keeps_the_newest_uses() -> None:
    steps = GrammarSteps(limits=GrammarLimits(max_cached=2), max_queued=100, max_running=20)
    texts = [FakeGrammar(seed=seed, num_tokens=3).text for seed in range(3)]
    for number, text in enumerate([texts[0], texts[1], texts[0], texts[2], texts[0]]):
        steps.ask(f"r{number}", text=text)
        steps.plan()
    assert (steps.queue.counters.grammars_compiled, steps.queue.counters.grammar_hits) == (3, 2)
    assert steps.queue.num_cached == 2
    assert steps.queue.clear_cache() == 2 and steps.queue.num_cached == 0


def test_only_rows_with_grammars_that_sample_get_masks() -> None:
    steps = GrammarSteps(max_step_tokens=8, prefill_chunk_tokens=8)
    steps.add("free", 2)
    steps.ask("bound", 7)
    first = steps.step()
    assert first.grammar_rows.tolist() == [], "its prompt is not complete"
    second = steps.plan()
    assert steps.rows(second) == [("free", 1), ("bound", 1)] and second.grammar_rows.tolist() == [1]


def test_the_answer_ends_with_its_grammar_even_if_end_tokens_are_ignored() -> None:
    steps = GrammarSteps()
    steps.ask("a", 6, 50, ignore_eos=True, min_new_tokens=40)
    plan = steps.plan()
    for _ in range(3):
        (allowed,) = steps.allowed(plan)
        assert EOS not in allowed
        steps.collect(plan, token=allowed[0])
        plan = steps.plan()
    assert plan is None
    assert (steps.finish_of().type, steps.finish_of().matched, len(steps.tokens_of())) == ("stop", None, 3)


def test_all_stop_tokens_of_the_request_end_an_answer_that_may_end() -> None:
    steps = GrammarSteps()
    grammar = next(
        it
        for it in (FakeGrammar(seed=seed, num_tokens=9) for seed in range(100))
        if it.may_end_after([]) and 998 not in it.allowed_after([], vocab_size=VOCAB_SIZE, end_ids=frozenset({EOS}))
    )
    steps.ask(text=grammar.text, stop_token_ids=(998,))
    plan = steps.plan()
    (allowed,) = steps.allowed(plan)
    assert {EOS, 998} < set(allowed)
    steps.collect(plan, token=998)
    assert (steps.finish_of().type, steps.finish_of().matched) == ("stop", 998)


def test_a_grammar_begins_after_its_marker_and_the_answer_cannot_end_before() -> None:
    steps = GrammarSteps()
    steps.ask("a", 6, 20, begins_after=(7, 8))
    plan = steps.plan()
    for token in (7, 7, 8):
        (allowed,) = steps.allowed(plan)
        assert len(allowed) == VOCAB_SIZE - 1 and EOS not in allowed
        steps.collect(plan, token=token)
        plan = steps.plan()
    (allowed,) = steps.allowed(plan)
    assert allowed == steps.matcher().allowed and len(allowed) < 10


def test_the_end_of_free_text_is_forced_after_its_limit() -> None:
    steps = GrammarSteps()
    steps.ask("a", 6, 20, begins_after=(7, 8), begins_within=2)
    for token, num_allowed in ((7, VOCAB_SIZE - 1), (9, VOCAB_SIZE - 1), (7, 1), (8, 1)):
        plan = steps.plan()
        (allowed,) = steps.allowed(plan)
        assert len(allowed) == num_allowed and token in allowed
        steps.collect(plan, token=token)
    (allowed,) = steps.allowed(steps.plan())
    assert allowed == steps.matcher().allowed


@pytest.mark.parametrize("opens", [True, False])
def test_free_text_that_must_be_opened_is_optional(opens: bool) -> None:
    steps = GrammarSteps()
    steps.ask("a", 6, 20, begins_after=(7,), begins_within=0, opens_with=11)
    plan = steps.plan()
    (allowed,) = steps.allowed(plan)
    assert sorted({*steps.matcher().allowed, 11}) == sorted({*allowed} - {EOS})
    steps.collect(plan, token=11 if opens else steps.first_token)
    (allowed,) = steps.allowed(steps.plan())
    assert (allowed == [7]) == opens, "the limit of 0 is reached with the opening token"
    assert opens or {*steps.matcher().allowed} <= {*allowed}


def test_a_limit_of_free_text_needs_no_grammar_and_no_mask_behind_it() -> None:
    steps = GrammarSteps()
    steps.ask("a", 6, 20, text="", begins_after=(7,), begins_within=1)
    for token, expected in ((9, list(range(VOCAB_SIZE))), (7, [7])):
        plan = steps.plan()
        assert steps.allowed(plan) == [expected]
        steps.collect(plan, token=token)
    assert not len(steps.plan().grammar_rows)
    assert not steps.jobs.open_jobs and not steps.compiler.compiled


def test_a_token_that_the_grammar_forbids_ends_its_request_and_no_other() -> None:
    steps = GrammarSteps()
    steps.ask("a")
    steps.add("b")
    plan = steps.plan()
    (allowed,) = steps.allowed(plan)
    steps.collect(plan, token=next(token for token in range(VOCAB_SIZE) if token not in allowed))
    assert (steps.finish_of("a").status, steps.tokens_of("a")) == (500, [])
    assert steps.finish_of("b") is None and len(steps.tokens_of("b")) == 1


def test_a_matcher_that_fails_ends_its_request_with_its_error() -> None:
    steps = GrammarSteps()
    steps.ask(text=FakeGrammar(seed=1, num_tokens=5, fails_at=0).text)
    plan = steps.plan()
    (allowed,) = steps.allowed(plan)
    assert len(allowed) == VOCAB_SIZE, "any token will do"
    steps.collect(plan, token=5)
    assert steps.finish_of().status == 400 and "the fake matcher fails" in steps.finish_of().message
    assert steps.tokens_of() == []


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_a_grammar_of_the_empty_answer_ends_it_without_a_token(ignore_eos: bool) -> None:
    steps = GrammarSteps()
    steps.ask(text=FakeGrammar(seed=1, num_tokens=0).text, ignore_eos=ignore_eos)
    plan = steps.plan()
    steps.allowed(plan)
    steps.collect(plan, token=5)
    assert (steps.finish_of().type, steps.tokens_of()) == ("stop", [])


def test_a_row_whose_request_has_left_may_take_any_token() -> None:
    """On a GPU the next step is launched before the tokens of this one are known."""
    steps = GrammarSteps()
    steps.ask("a")
    steps.add("b")
    first = steps.plan()
    allowed = steps.allowed(first)[0]
    second = steps.plan()
    steps.collect(first, token=allowed[0])
    steps.scheduler.abort("a", match="exact", message="aborted")
    assert len(second.grammar_rows) == 1 and len(steps.allowed(second)[0]) == VOCAB_SIZE
    steps.collect(second, token=5)
    assert len(steps.tokens_of("a")) == 1 and len(steps.tokens_of("b")) == 2


def test_a_retracted_request_keeps_its_place() -> None:
    steps = GrammarSteps()
    steps.ask("a", 6, 20)
    plan = steps.plan()
    steps.collect(plan, token=steps.allowed(plan)[0][0])
    wanted = steps.matcher().allowed
    steps.plan()  # its result is dropped
    steps.scheduler.retract_all()
    again = steps.plan()
    assert again.grammar_rows.tolist() == [0] and steps.matcher().allowed == wanted


def test_a_request_that_generates_nothing_needs_no_compilation() -> None:
    steps = GrammarSteps(hangs=True)
    steps.ask("a", 6, 0)
    steps.step()
    assert steps.finish_of().type == "length"


def test_masks_without_a_compiler_are_a_bug() -> None:
    steps = GrammarSteps()
    steps.ask()
    plan = steps.plan()
    buffer = MaskBuffer(None, steps.scheduler.running.slots)
    with pytest.raises(AssertionError):
        buffer.fill(plan)


def test_the_buffer_of_masks_is_used_again() -> None:
    steps = GrammarSteps()
    for rid in "ab":
        steps.ask(rid)
    plan = steps.plan()
    first = steps.scheduler.masks.fill(plan).words
    second = steps.scheduler.masks.fill(plan).words
    assert np.shares_memory(first, second) and first.shape == (2, 32)
