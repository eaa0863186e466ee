"""Grammars compiled by llguidance for a vocabulary of single characters and a few words."""

import gc
import json
import sys
import threading
from collections.abc import Callable

import numpy as np
import pytest
from llguidance import LLMatcher

from headwater.grammars.compiler import GuidanceCompiler
from headwater.grammars.matcher import Matcher
from headwater.grammars.vocabulary import Vocabulary

END, OTHER_END = 200, 201
WORDS = {202: b"true", 203: b'{"', 204: b'": '}
NUM_TOKENS = 210  # the last ones are padding, as models have it


def encode(text: str) -> list[int]:
    return [byte if byte < 200 else 199 for byte in text.encode()]


@pytest.fixture(scope="module")
def compiler() -> GuidanceCompiler:
    tokens = [bytes([byte]) for byte in range(200)] + [b"<|end|>", b"<|turn|>", *WORDS.values()]
    tokens += [b""] * (NUM_TOKENS - len(tokens))
    vocabulary = Vocabulary(tokens=tokens, special_ids=frozenset({END, OTHER_END}), end_id=END, encode=encode)
    return GuidanceCompiler(lambda: vocabulary, vocab_size=NUM_TOKENS, num_threads=2)


def allowed(compiler: GuidanceCompiler, *matchers: Matcher) -> list[tuple[set[int], bool]]:
    """For each matcher the tokens that may come next, and whether the answer may end."""
    masks = np.full((len(matchers), compiler.num_words), 0xFFFFFFFF, dtype=np.uint32)
    may_end = compiler.fill(matchers, masks)
    bits = np.unpackbits(masks.view(np.uint8), axis=1, bitorder="little")
    return [(set(np.flatnonzero(row).tolist()), bool(end)) for row, end in zip(bits, may_end, strict=True)]


def schema(**properties: object) -> str:
    required = list(properties)
    return LLMatcher.grammar_from_json_schema(
        {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    )


def test_a_schema_allows_what_may_come_next_and_nothing_else(compiler: GuidanceCompiler) -> None:
    matcher = compiler.compile(schema(a={"type": "boolean"}))
    ((first, may_end),) = allowed(compiler, matcher)
    assert {ord("{"), 203} <= first and not may_end
    assert not first & {ord("["), ord("a"), END, OTHER_END, 205, 209}
    for token in [203, ord("a"), 204, 202]:
        assert matcher.accept(token), token
    assert not matcher.is_complete
    ((last, _),) = allowed(compiler, matcher)
    assert ord("}") in last and ord(",") not in last
    assert matcher.accept(ord("}"))


def test_an_answer_that_nothing_can_follow_is_complete(compiler: GuidanceCompiler) -> None:
    matcher = compiler.compile(LLMatcher.grammar_from_regex("ab"))
    assert matcher.accept(ord("a")) and not matcher.is_complete
    assert matcher.accept(ord("b")) and matcher.is_complete


def test_an_answer_that_may_end_or_go_on_says_so_and_masks_hold_no_end(compiler: GuidanceCompiler) -> None:
    """The end tokens are the engine's business: `ignore_eos` must be able to leave them out."""
    matcher = compiler.compile(LLMatcher.grammar_from_regex("ab*"))
    assert matcher.accept(ord("a"))
    ((tokens, may_end),) = allowed(compiler, matcher)
    assert tokens == {ord("b")} and may_end and not matcher.is_complete


def test_the_empty_answer_is_complete_from_the_start(compiler: GuidanceCompiler) -> None:
    assert compiler.compile('start: ""').is_complete


def test_copies_advance_by_themselves_and_masks_belong_to_their_rows(compiler: GuidanceCompiler) -> None:
    first = compiler.compile(LLMatcher.grammar_from_regex("abc"))
    second = first.copy()
    other = compiler.compile(LLMatcher.grammar_from_regex("xyz"))
    assert first.accept(ord("a"))
    found = allowed(compiler, first, second, other)
    assert [tokens for tokens, _ in found] == [{ord("b")}, {ord("a")}, {ord("x")}]


def test_a_forbidden_token_is_refused_and_ends_only_its_own_matcher(compiler: GuidanceCompiler) -> None:
    first = compiler.compile(LLMatcher.grammar_from_regex("abc"))
    second = first.copy()
    assert not first.accept(ord("z"))
    assert first.error and not first.is_complete
    assert not first.accept(ord("a")), "it is past use"
    assert second.accept(ord("a")) and not second.error
    masks = np.zeros((2, compiler.num_words), dtype=np.uint32)
    compiler.fill([first, second], masks)  # does not raise
    assert first.error and not second.error


def test_a_grammar_that_turns_out_too_complex_fails_behind_a_token_that_it_allows(compiler: GuidanceCompiler) -> None:
    """Unlike a token that is not allowed, this is the client's fault."""
    words = {"type": "string", "pattern": r"^(?:\S+\s+){0,49}\S+$", "maxLength": 5000}
    root = compiler.compile(LLMatcher.grammar_from_json_schema(words))
    for _ in range(2):
        matcher = root.copy()
        assert ord('"') in allowed(compiler, matcher)[0][0] and not matcher.error
        assert matcher.accept(ord('"'))
        assert matcher.error.startswith("lexer error") and not matcher.is_complete


@pytest.mark.parametrize(
    "text",
    [
        "",
        "start: missing",
        'start: "a',
        LLMatcher.grammar_from_regex("(a"),
        LLMatcher.grammar_from_json_schema({"type": "nothing"}),
        json.dumps({"grammars": [{"json_schema": {"enum": []}}]}),
    ],
)
def test_what_is_no_grammar_is_a_value_error_of_one_line(compiler: GuidanceCompiler, text: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        compiler.compile(text)


def test_special_tokens_match_no_text(compiler: GuidanceCompiler) -> None:
    """Else a string of a schema could hold `<|end|>` as one token, and the answer would end in its midst."""
    matcher = compiler.compile(LLMatcher.grammar_from_regex("<.*"))
    ((tokens, _),) = allowed(compiler, matcher)
    assert tokens == {ord("<")}
    assert matcher.accept(ord("<"))
    ((tokens, _),) = allowed(compiler, matcher)
    assert not tokens & {END, OTHER_END}


def test_a_lark_grammar_names_special_tokens(compiler: GuidanceCompiler) -> None:
    matcher = compiler.compile('start: <|turn|> "a"')
    ((tokens, _),) = allowed(compiler, matcher)
    assert tokens == {OTHER_END}
    assert matcher.accept(OTHER_END) and matcher.accept(ord("a")) and matcher.is_complete


def test_the_vocabulary_is_read_with_the_first_grammar_and_once() -> None:
    loads: list[int] = []

    def load() -> Vocabulary:
        loads.append(1)
        return Vocabulary(tokens=[b"a", b"b", b"<e>"], special_ids=frozenset({2}), end_id=2, encode=encode)

    compiler = GuidanceCompiler(load, vocab_size=3, num_threads=1)
    assert not loads and compiler.num_words == 1
    for _ in range(2):
        compiler.compile('start: "a"')
    assert loads == [1]


def test_a_prepared_vocabulary_is_not_read_again_and_its_tokens_are_not_kept() -> None:
    loads: list[str] = []
    long = bytes(1000)
    num_references = sys.getrefcount(long)

    def load() -> Vocabulary:
        loads.append(threading.current_thread().name)
        return Vocabulary(tokens=[b"a", b"b", b"<e>", long], special_ids=frozenset({2}), end_id=2, encode=encode)

    compiler = GuidanceCompiler(load, vocab_size=4, num_threads=1)
    compiler.prepare()
    ((first, _),) = allowed(compiler, compiler.compile('start: "a"'))  # waits for the thread, or is before it
    for thread in threading.enumerate():
        if thread.name == "grammar-vocabulary":
            thread.join()
    ((second, _),) = allowed(compiler, compiler.compile('start: "b"'))
    assert (first, second, len(loads)) == ({0}, {1}, 1)
    gc.collect()
    assert sys.getrefcount(long) == num_references


def test_a_vocabulary_that_cannot_be_read_fails_grammars_and_not_the_preparation() -> None:
    def load() -> Vocabulary:
        raise ValueError("no end token")

    compiler = GuidanceCompiler(load, vocab_size=3, num_threads=1)
    compiler._prepare()
    with pytest.raises(ValueError, match="no end token"):
        compiler.compile('start: "a"')


def test_copies_are_of_several_roots_and_advance_by_themselves() -> None:
    """Copies of one root share an automaton, for which threads wait."""
    tokens = [bytes([byte]) for byte in range(200)] + [b"<|end|>"]
    vocabulary = Vocabulary(tokens=tokens, special_ids=frozenset({END}), end_id=END, encode=encode)
    compiler = GuidanceCompiler(lambda: vocabulary, vocab_size=len(tokens), num_threads=8)
    compiled = compiler.compile(LLMatcher.grammar_from_regex("a[bc]d"))
    copies = [compiled.copy() for _ in range(8)]
    for index, matcher in enumerate(copies):
        for token in b"abd"[: index % 4]:
            assert matcher.accept(token)
    expected = [{ord("a")}, {ord("b"), ord("c")}, {ord("d")}]
    begun = [(index, matcher) for index, matcher in enumerate(copies) if index % 4 < 3]
    found = allowed(compiler, *(matcher for _, matcher in begun))
    assert [ids for ids, _ in found] == [expected[index % 4] for index, _ in begun]
    assert len({matcher.root for matcher in copies}) == 8, "each thread has a root"  # type: ignore[attr-defined]


def characters(*, num_threads: int, spell: Callable[[str], list[int]] = encode) -> GuidanceCompiler:
    tokens = [bytes([byte]) for byte in range(200)] + [b"<|end|>", b"<|turn|>", *WORDS.values()]
    vocabulary = Vocabulary(tokens=tokens, special_ids=frozenset({END, OTHER_END}), end_id=END, encode=spell)
    return GuidanceCompiler(lambda: vocabulary, vocab_size=len(tokens), num_threads=num_threads)


def test_many_threads_fill_the_masks_that_one_fills() -> None:
    """Rows of two grammars at different places; one of them fails on the way, and no other row notices."""
    texts = (
        schema(a={"type": "string", "maxLength": 3}, b={"type": "boolean"}, c={"enum": ["true", "truce"]}),
        LLMatcher.grammar_from_regex("(ab|ac)*d{1,3}"),
    )
    compilers = characters(num_threads=1), characters(num_threads=8)
    roots = [[it.compile(text) for text in texts] for it in compilers]
    sides = [[grammars[row % 3 > 1].copy() for row in range(32)] for grammars in roots]
    rng = np.random.default_rng(3)
    for step in range(30):
        one, many = [allowed(it, *side) for it, side in zip(compilers, sides, strict=True)]
        assert one == many
        for row, (tokens, may_end) in enumerate(one):
            token = ord("?") if (row, step) == (5, 2) else int(rng.choice(sorted(tokens))) if tokens else END
            accepted = {side[row].accept(token) for side in sides}
            assert len(accepted) == 1
            assert accepted != {False} or row == 5 or may_end, "END is a token of the library's as well"
        for one_side, other_side in zip(*sides, strict=True):
            assert (one_side.is_complete, one_side.error) == (other_side.is_complete, other_side.error)
    assert [row for row, it in enumerate(sides[1]) if it.error] == [5]


@pytest.mark.parametrize("num_threads", [1, 8])
def test_a_text_without_a_choice_is_spelled_once_and_not_by_threads(num_threads: int) -> None:
    spelled: list[tuple[str, str]] = []

    def spell(text: str) -> list[int]:
        spelled.append((text, threading.current_thread().name))
        return encode(text)

    compiler = characters(num_threads=num_threads, spell=spell)
    compiled = compiler.compile(LLMatcher.grammar_from_regex("x?(one long text that leaves no choice|y)"))
    rows = [compiled.copy() for _ in range(16)]
    spelled.clear()
    for row in rows:
        allowed(compiler, row)
        assert row.accept(ord("x")) and allowed(compiler, row)[0][0] == {ord("o"), ord("y")}
        assert row.accept(ord("o"))
    for byte in b"ne long text that leaves no choice":
        assert allowed(compiler, *rows) == [({byte}, False)] * len(rows)
        assert all(row.accept(byte) for row in rows)
    assert all(row.is_complete for row in rows)
    assert spelled == [("one long text that leaves no choice", "MainThread")]


def test_a_token_beside_the_forced_one_is_refused_and_forgets_it(compiler: GuidanceCompiler) -> None:
    matcher = compiler.compile(LLMatcher.grammar_from_regex("abc")).copy()
    assert allowed(compiler, matcher)[0][0] == {ord("a")}
    assert not matcher.accept(ord("b")) and matcher.error
    other = compiler.compile(LLMatcher.grammar_from_regex('ab"true')).copy()
    for byte in b'ab"t':
        assert allowed(compiler, other)[0][0] == {byte}, "the tokens that the tokenizer spells, and no word"
        assert other.accept(byte)
    word = compiler.compile(LLMatcher.grammar_from_regex("truex")).copy()
    assert allowed(compiler, word)[0][0] == {ord("t")}
    assert word.accept(202), "another spelling of the text, as a speculating engine may bring it"
    assert allowed(compiler, word)[0][0] == {ord("x")}
