"""The place of one request in its grammar."""

from collections import deque

from headwater.grammars.matcher import Matcher
from headwater.messages.generation import Grammar


class GrammarState:
    """Advances when a token is recorded and at no other time, so steps that are dropped or repeated leave no trace.

    The state survives retraction and parking: the request keeps its tokens, and with them its place.
    """

    def __init__(self, grammar: Grammar) -> None:
        self.text = grammar.text
        self._begins_after = grammar.begins_after
        self._opens_with = grammar.opens_with
        self._most_free = grammar.begins_within  # tokens of free text; the one that opens it is the first
        if self._opens_with is not None and self._most_free == 0:
            self._most_free = 1
        self._newest: deque[int] = deque(maxlen=len(grammar.begins_after))  # tokens of the free text
        self._num_free = 0  # tokens of the free text so far
        self._has_begun = not grammar.begins_after
        self._matcher: Matcher | None = None

    @property
    def needs_mask(self) -> bool:
        """Whether anything may limit the next tokens."""
        return bool(self.text) or not self._has_begun

    @property
    def matcher(self) -> Matcher | None:
        """What chooses the next token; None in the free text before the grammar begins, and without a grammar."""
        return self._matcher if self._has_begun or self.opening_token is not None else None

    @property
    def opening_token(self) -> int | None:
        """The token that may come next, besides those of the grammar, and begins free text."""
        return None if self._has_begun or self._num_free else self._opens_with

    @property
    def forced_token(self) -> int | None:
        """The only token that may come next, since the free text is long enough."""
        if self._has_begun or self._most_free is None or self._num_free < self._most_free:
            return None
        return self._begins_after[self._num_free - self._most_free]

    @property
    def is_in_free_text(self) -> bool:
        """Whether the answer may not end here, since its grammar has not begun."""
        return bool(self.text) and self.matcher is None

    @property
    def is_complete(self) -> bool:
        """Whether the answer matches, and no further token can follow."""
        return self.matcher is not None and self.matcher.is_complete

    @property
    def is_over(self) -> bool:
        """Whether no further token can be chosen."""
        return bool(self.error) or self.is_complete

    @property
    def error(self) -> str:
        """Why the matcher can no longer be used; empty while it can."""
        return "" if self._matcher is None else self._matcher.error

    def begin(self, matcher: Matcher) -> None:
        """The grammar is compiled. `matcher` is at its start, and belongs to this request from now on."""
        assert self._matcher is None, "a grammar is compiled once"
        self._matcher = matcher

    def accept(self, token_id: int) -> bool:
        """Advance by a recorded token. False if the grammar does not allow it."""
        assert self._matcher is not None or not self.text, "a request runs before its grammar is compiled"
        if self.opening_token not in (None, token_id):
            self._has_begun = True
        if self._has_begun:
            return self._matcher is None or self._matcher.accept(token_id)
        self._num_free += 1
        self._newest.append(token_id)
        self._has_begun = tuple(self._newest) == self._begins_after
        return True
