"""Mutants of the file store."""

from headwater.simulation.mutants.registry import Patch, mutant
from headwater.storage.file import store as file_store
from headwater.storage.file.generations import FileGenerations


@mutant(profile="files", seed=17)
def flipped_bits_in_files_are_served() -> list[Patch]:
    """The checksum of a page in a file is not verified."""
    return [(file_store, "find_defect", lambda key, header, payload: None)]  # type: ignore[list-item]


@mutant(profile="files")
def flushes_of_files_are_not_written() -> list[Patch]:
    """A raised generation is reported but not written to the file."""
    right = FileGenerations.current
    return [(FileGenerations, "raise_one", lambda self, scope_id: right(self, (scope_id,))[0] + 1)]
