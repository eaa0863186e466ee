"""Grammars compiled by llguidance, for one vocabulary."""

import contextlib
import ctypes
import logging
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import llguidance
import llguidance.numpy
import numpy as np
import numpy.typing as npt

from headwater.grammars.matcher import Matcher
from headwater.grammars.vocabulary import Vocabulary

_NUM_ROOTS = 4  # of a grammar, with as many threads
_LIMITS = re.compile("lexer error|fuel exhausted|too many", re.IGNORECASE)  # errors of a grammar, not of a token
_MIN_SHARED_ROWS = 8  # few rows take less time than threads to wake up

_log = logging.getLogger(__name__)


class GuidanceMatcher:
    """An llguidance matcher (matcher.Matcher). Failures are states, never exceptions."""

    def __init__(self, inner: llguidance.LLMatcher, *, is_empty: bool = False) -> None:
        """`is_empty`: only the empty answer matches, which the library shows in the first mask alone."""
        self.inner = inner
        self.error = ""
        self._is_empty = is_empty

    @property
    def is_complete(self) -> bool:
        return self._is_empty or (self.inner.is_stopped() and not self.error)

    def accept(self, token_id: int) -> bool:
        if self.inner.consume_token(token_id):
            return True
        self.error = _reason(self.inner) if self.inner.is_error() else ""
        return bool(_LIMITS.search(self.error))

    def copy(self) -> "GuidanceMatcher":
        return GuidanceMatcher(self.inner.deep_copy(), is_empty=self._is_empty)


class _CompiledGrammar(GuidanceMatcher):
    """A matcher at the start of its grammar, with more of them, the *roots*, that were compiled apart.

    Copies of one root share its automaton, and wait for one another when several threads fill their masks.
    """

    def __init__(self, roots: Sequence[llguidance.LLMatcher], *, is_empty: bool) -> None:
        super().__init__(roots[0], is_empty=is_empty)
        self.roots = roots
        self._num_copies = 0

    def copy(self) -> GuidanceMatcher:
        """A copy of the root whose turn it is."""
        self._num_copies += 1
        root = self.roots[self._num_copies % len(self.roots)]
        return GuidanceMatcher(root.deep_copy(), is_empty=self._is_empty)


class GuidanceCompiler:
    """A compiler (matcher.GrammarCompiler). It reads its vocabulary when it is prepared, or for the first grammar."""

    def __init__(self, load: Callable[[], Vocabulary], *, vocab_size: int, num_threads: int) -> None:
        """`vocab_size`: the model's logits. `load` is called once, in a thread that prepares or compiles."""
        self.num_words = -(-vocab_size // 32)
        self._load = load
        self._vocab_size = vocab_size
        self._lock = threading.Lock()
        self._tokenizer: llguidance.LLTokenizer | None = None
        self._end_id = 0
        self._num_threads = num_threads
        self._executor: llguidance.LLExecutor | None = None  # its threads begin with the first grammar
        self._num_roots = _NUM_ROOTS if num_threads >= _NUM_ROOTS else 1
        self._pool = ThreadPoolExecutor(_NUM_ROOTS, "grammar-roots")  # starts its threads when they are first used

    @property
    def is_ready(self) -> bool:
        return self._tokenizer is not None

    def prepare(self) -> None:
        threading.Thread(target=self._prepare, name="grammar-vocabulary", daemon=True).start()

    def compile(self, text: str) -> Matcher:
        tokenizer = self._ready_tokenizer()

        def make_root() -> tuple[llguidance.LLMatcher, bytes]:
            root = llguidance.LLMatcher(tokenizer, text, log_level=0)
            return root, root.compute_bitmask()  # some grammars show only here that they are too complex

        others = [self._pool.submit(make_root) for _ in range(self._num_roots - 1)]
        inner, first = make_root()
        if inner.is_error():
            raise ValueError(_reason(inner))
        roots = [inner, *(root for root, _ in (other.result() for other in others) if not root.is_error())]
        return _CompiledGrammar(roots, is_empty=int.from_bytes(first, "little") == 1 << self._end_id)

    def fill(self, matchers: Sequence[Matcher], masks: npt.NDArray[np.uint32]) -> npt.NDArray[np.bool_]:
        own = [it for it in matchers if isinstance(it, GuidanceMatcher)]
        assert self._executor is not None and len(own) == len(matchers) == len(masks), "matchers of another compiler"
        if self._num_threads >= _NUM_ROOTS and len(own) >= _MIN_SHARED_ROWS:
            pairs = [(it.inner, row) for row, it in enumerate(own)]
            llguidance.numpy.fill_next_token_bitmask_par(self._executor, pairs, masks.view(np.int32))
        else:
            for it, words in zip(own, masks, strict=True):
                it.inner.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        for it in own:
            if it.inner.is_error():
                it.error = _reason(it.inner)
        word, bit = self._end_id // 32, np.uint32(1 << self._end_id % 32)
        may_end = (masks[:, word] & bit) != 0
        masks[:, word] &= ~bit
        return may_end

    def _prepare(self) -> None:
        try:
            self._ready_tokenizer()
        except (ValueError, OSError) as error:  # the first request with a grammar gets the same reason
            _log.info("this model computes without grammars: %s", error)

    def _ready_tokenizer(self) -> llguidance.LLTokenizer:
        with self._lock:
            if self._tokenizer is None:
                vocabulary = self._load()
                assert len(vocabulary.tokens) == self._vocab_size
                self._end_id = vocabulary.end_id
                self._executor = llguidance.LLExecutor(num_threads=self._num_threads)
                tokens = _Tokens(vocabulary)
                self._tokenizer = llguidance.LLTokenizer(tokens)
                tokens.forget(self._tokenizer)
                _give_back_memory()
            return self._tokenizer


class _Tokens(llguidance.TokenizerWrapper):
    """A vocabulary in the form that llguidance reads. It keeps no tokens once they have been read."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.is_tokenizer_wrapper = True
        self.eos_token_id = vocabulary.end_id
        self.bos_token_id = None
        self.tokens = list(vocabulary.tokens)
        self.special_token_ids = sorted(vocabulary.special_ids)
        self._encode = vocabulary.encode
        self._read: llguidance.LLTokenizer | None = None  # made of these tokens

    def forget(self, read: llguidance.LLTokenizer) -> None:
        self.tokens = []
        self._read = read

    def __call__(self, text: str) -> list[int]:
        """The tokens that are allowed where a grammar leaves no choice of text. They must spell it exactly."""
        ids = self._encode(text)
        if self._read is None or self._read.decode_bytes(ids) == text.encode():
            return ids
        return self._read.greedy_tokenize(text)  # a tokenizer may normalise text


def _give_back_memory() -> None:
    """Reading a vocabulary leaves megabytes of freed memory, which glibc would keep."""
    with contextlib.suppress(OSError, AttributeError):  # other systems
        ctypes.CDLL(None).malloc_trim(0)


def _reason(inner: llguidance.LLMatcher) -> str:
    """Why a matcher has failed, in one line."""
    return (inner.get_error().splitlines() or ["the grammar library gives no reason"])[0]
