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
        self._newest: deque[int] = deque(maxlen=len(grammar.begins_after))  # tokens of the free text
        self._has_begun = not grammar.begins_after
        self._matcher: Matcher | None = None

    @property
    def matcher(self) -> Matcher | None:
        """What chooses the next token; None in the free text before the grammar begins."""
        return self._matcher if self._has_begun else None

    @property
    def is_complete(self) -> bool:
        """Whether the answer matches, and no further token can follow."""
        return self.matcher is not None and self.matcher.is_complete

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
        assert self._matcher is not None, "a request runs before its grammar is compiled"
        if self._has_begun:
            return self._matcher.accept(token_id)
        self._newest.append(token_id)
        self._has_begun = tuple(self._newest) == self._begins_after
        return True
