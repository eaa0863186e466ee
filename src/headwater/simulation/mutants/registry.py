"""Mutants: engines that break one rule of the design each, which random runs must notice.

A mutant replaces one method while it is in force. Its docstring names the broken rule; docs/mutants.md lists the turns
that each hunt took.
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
    """One broken rule. Runs of `profile` meet it often, and the run of `seed` meets it early."""

    name: str
    breaks: str
    profile: str
    seed: int
    make_patches: MakePatches

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Break the rule within the block."""
        with ExitStack() as stack:
            for owner, name, replacement in self.make_patches():
                stack.enter_context(patch.object(owner, name, replacement))
            yield


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether and how a mutant was noticed; `num_turns` is the sum over all runs of the hunt."""

    mutant: str
    promise: str | None
    num_turns: int
    num_runs: int


MUTANTS: dict[str, Mutant] = {}


def mutant(
    *, profile: str = "mixed", seed: int = 0, into: dict[str, Mutant] = MUTANTS
) -> Callable[[MakePatches], MakePatches]:
    """Register a function that makes the patches of a mutant; its docstring says what it breaks."""

    def register(make_patches: MakePatches) -> MakePatches:
        name = make_patches.__name__
        into[name] = Mutant(name, (make_patches.__doc__ or "").strip(), profile, seed, make_patches)
        return make_patches

    return register
