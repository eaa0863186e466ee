"""Known-wrong engines: each breaks one rule of the design, and random runs must notice.

A mutant replaces one method while it is in force. Its docstring says what it breaks; docs/mutants.md
lists how many turns each took.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

Patch = tuple[type, str, Any]
MakePatches = Callable[[], list[Patch]]


@dataclass(frozen=True, slots=True)
class Mutant:
    """One way to be wrong. `profile` is one whose runs meet it often, `seed` one of a run that met it early."""

    name: str
    breaks: str
    profile: str
    seed: int
    make_patches: MakePatches

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """The engine is wrong in this way within the block."""
        with ExitStack() as stack:
            for owner, name, replacement in self.make_patches():
                stack.enter_context(patch.object(owner, name, replacement))
            yield


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether and how a mutant was caught; `num_turns` is the sum over all runs it took."""

    mutant: str
    promise: str | None
    num_turns: int
    num_runs: int


MUTANTS: dict[str, Mutant] = {}


def mutant(*, profile: str = "mixed", seed: int = 0) -> Callable[[MakePatches], MakePatches]:
    """Register a function that makes the patches of a mutant; its docstring says what it breaks."""

    def register(make_patches: MakePatches) -> MakePatches:
        name = make_patches.__name__
        MUTANTS[name] = Mutant(name, (make_patches.__doc__ or "").strip(), profile, seed, make_patches)
        return make_patches

    return register
