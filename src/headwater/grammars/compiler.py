"""Grammars compiled by llguidance, for one vocabulary."""

import functools
import itertools
import logging
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from headwater.grammars.library import LLExecutor, LLMatcher, LLTokenizer
from headwater.grammars.matcher import Matcher
from headwater.grammars.vocabulary import Vocabulary
from headwater.heap import give_back_memory

_LIMITS = re.compile("lexer error|fuel exhausted|too many", re.IGNORECASE)  # errors of a grammar, not of a token
_MIN_THREADS = 4  # fewer do not pay for waking them up
_MIN_SHARED_ROWS = 8  # few rows take less time than threads to wake up
# Tokens that are allowed together where a grammar allows all texts of this kind: the inside of a JSON string, and short
# parts of it for strings with a maximal length. Each kind takes megabytes, so these are fewer than the library's own.
_INSIDE = r'[^"\\\x00-\x1F\x7F]'
_SLICES = [_INSIDE + "{1,10}", _INSIDE + "{1,16}", _INSIDE + "+"]
_MAX_KEPT_TEXTS = 1024  # whose tokens are remembered, if they are short
_MAX_KEPT_CHARS = 200

_log = logging.getLogger(__name__)


class GuidanceMatcher:
    """An llguidance matcher (matcher.Matcher). Failures are states, never exceptions."""

    def __init__(self, inner: LLMatcher, *, root: int, is_empty: bool = False) -> None:
        """`root`: the number of the automaton, which copies share. `is_empty`: only the empty answer matches, which
        the library shows in the first mask alone."""
        self.inner = inner
        self.root = root
        self.error = ""
        self._is_empty = is_empty
        self._forced: list[int] = []  # the next token last

    @property
    def is_complete(self) -> bool:
        return self._is_empty or (self.inner.is_stopped() and not self.error)

    def forced_token(self) -> int | None:
        """The next token of a text that the grammar leaves no choice of, in the model's usual spelling; else None.

        The library would ask for the spelling in every mask, from its own threads, which wait for Python's lock.
        """
        if not self._forced:
            self._forced = self.inner.compute_ff_tokens()[::-1]
        return self._forced[-1] if self._forced else None

    def accept(self, token_id: int) -> bool:
        if self._forced and self._forced.pop() != token_id:
            self._forced.clear()
        if self.inner.consume_token(token_id):
            return True
        self.error = _reason(self.inner) if self.inner.is_error() else ""
        return bool(_LIMITS.search(self.error))

    def copy(self) -> "GuidanceMatcher":
        copied = GuidanceMatcher(self.inner.deep_copy(), root=self.root, is_empty=self._is_empty)
        copied._forced = self._forced.copy()
        return copied


class _CompiledGrammar(GuidanceMatcher):
    """A matcher at the start of its grammar, with more of them, the *roots*, that were compiled apart.

    Copies of one root share its automaton, and wait for one another when several threads fill their masks.
    """

    def __init__(self, roots: Sequence[GuidanceMatcher]) -> None:
        super().__init__(roots[0].inner, root=roots[0].root, is_empty=roots[0]._is_empty)
        self.roots = roots
        self._num_copies = 0

    def copy(self) -> GuidanceMatcher:
        """A copy of the root whose turn it is."""
        self._num_copies += 1
        return self.roots[self._num_copies % len(self.roots)].copy()


class GuidanceCompiler:
    """A compiler (matcher.GrammarCompiler). It reads its vocabulary when it is prepared, or for the first grammar."""

    def __init__(self, load: Callable[[], Vocabulary], *, vocab_size: int, num_threads: int) -> None:
        """`vocab_size`: the model's logits. `load` is called once, in a thread that prepares or compiles.

        `num_threads` fill the masks of a step, if there are enough to pay.
        """
        self.num_words = -(-vocab_size // 32)
        self._load = load
        self._vocab_size = vocab_size
        self._lock = threading.Lock()
        self._tokenizer: LLTokenizer | None = None
        self._end_id = 0
        self._executor: LLExecutor | None = None  # of several threads, which begin with the first grammar
        self._num_threads = num_threads if num_threads >= _MIN_THREADS else 1
        self._pool = ThreadPoolExecutor(self._num_threads, "grammar-roots")  # starts its threads when first used
        self._root_numbers = itertools.count()

    @property
    def is_ready(self) -> bool:
        return self._tokenizer is not None

    def prepare(self) -> None:
        threading.Thread(target=self._prepare, name="grammar-vocabulary", daemon=True).start()

    def compile(self, text: str) -> Matcher:
        tokenizer = self._ready_tokenizer()

        def make_root() -> tuple[LLMatcher, bytes]:
            root = LLMatcher(tokenizer, text, log_level=0)
            return root, root.compute_bitmask()  # some grammars show only here that they are too complex

        others = [self._pool.submit(make_root) for _ in range(self._num_threads - 1)]
        inner, first = make_root()
        if inner.is_error():
            raise ValueError(_reason(inner))
        is_empty = int.from_bytes(first, "little") == 1 << self._end_id
        inners = [inner, *(root for root, _ in (other.result() for other in others) if not root.is_error())]
        return _CompiledGrammar(
            [GuidanceMatcher(it, root=next(self._root_numbers), is_empty=is_empty) for it in inners]
        )

    def fill(self, matchers: Sequence[Matcher], masks: npt.NDArray[np.uint32]) -> npt.NDArray[np.bool_]:
        own = [it for it in matchers if isinstance(it, GuidanceMatcher)]
        assert len(own) == len(matchers) == len(masks), "matchers of another compiler"
        masks[:] = 0
        free: list[tuple[GuidanceMatcher, int]] = []
        for row, it in enumerate(own):
            if (forced := it.forced_token()) is None:
                free.append((it, row))
            else:
                masks[row, forced // 32] = np.uint32(1 << forced % 32)
        if free:
            self._fill_free(free, masks)
        word, bit = self._end_id // 32, np.uint32(1 << self._end_id % 32)
        may_end = (masks[:, word] & bit) != 0
        masks[:, word] &= ~bit
        return may_end

    def _fill_free(self, rows: list[tuple[GuidanceMatcher, int]], masks: npt.NDArray[np.uint32]) -> None:
        """Fill the rows in which the library has to look for the allowed tokens."""
        address, num_bytes = masks.ctypes.data, masks.strides[0]
        if self._executor is not None and len(rows) >= _MIN_SHARED_ROWS:
            rows = sorted(rows, key=lambda pair: pair[0].root)  # neighbours share a thread, not a lock
            pairs = [(it.inner, row) for it, row in rows]
            self._executor.unsafe_compute_mask_ptr(pairs, address, num_bytes, len(masks))
        else:
            for it, row in rows:
                it.inner.unsafe_compute_mask_ptr(address + row * num_bytes, num_bytes)
        for it, _ in rows:
            if it.inner.is_error():
                it.error = _reason(it.inner)

    def _prepare(self) -> None:
        try:
            self._ready_tokenizer()
        except (ValueError, OSError) as error:  # the first request with a grammar gets the same reason
            _log.info("this model computes without grammars: %s", error)

    def _ready_tokenizer(self) -> LLTokenizer:
        with self._lock:
            if self._tokenizer is None:
                vocabulary = self._load()
                assert len(vocabulary.tokens) == self._vocab_size
                self._end_id = vocabulary.end_id
                if self._num_threads > 1:
                    self._executor = LLExecutor(num_threads=self._num_threads)
                tokens = _Tokens(vocabulary)
                self._tokenizer = LLTokenizer(tokens, slices=_SLICES)  # type: ignore[arg-type]  a wrapper by its fields
                tokens.forget(self._tokenizer)
                give_back_memory()
            return self._tokenizer


class _Tokens:
    """A vocabulary in the form that llguidance reads. It keeps no tokens once they have been read."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.is_tokenizer_wrapper = True
        self.eos_token_id = vocabulary.end_id
        self.bos_token_id = None
        self.tokens = list(vocabulary.tokens)
        self.special_token_ids = sorted(vocabulary.special_ids)
        self._encode = vocabulary.encode
        self._encode_again = functools.lru_cache(_MAX_KEPT_TEXTS)(vocabulary.encode)  # rows repeat their texts
        self._read: LLTokenizer | None = None  # made of these tokens

    def forget(self, read: LLTokenizer) -> None:
        self.tokens = []
        self._read = read

    def __call__(self, text: str) -> list[int]:
        """The tokens that are allowed where a grammar leaves no choice of text. They must spell it exactly."""
        ids = (self._encode_again if len(text) <= _MAX_KEPT_CHARS else self._encode)(text)
        if self._read is None or self._read.decode_bytes(ids) == text.encode():
            return ids
        return self._read.greedy_tokenize(text)  # a tokenizer may normalise text


def _reason(inner: LLMatcher) -> str:
    """Why a matcher has failed, in one line."""
    return (inner.get_error().splitlines() or ["the grammar library gives no reason"])[0]
