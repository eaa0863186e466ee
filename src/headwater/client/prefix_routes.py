"""Which engines have computed the beginning of a prompt, as far as this process knows."""

import hashlib
from collections import OrderedDict

from headwater.messages.generation import Generate

MAX_ENTRIES = 100_000
MAX_DEPTH_PAGES = 1024  # beyond that, two prompts that still agree go to the same engine anyway
_TOKEN_BYTES = 4


class PrefixRoutes:
    """A bounded map from beginnings of prompts to the engines that were sent them, newest kept.

    A beginning is the first 1, 2, 4, ... pages of token ids under one namespace, so a prompt costs a dozen
    entries at most. The map is only a hint: an engine may have evicted the pages, which costs a prefill.
    """

    def __init__(self, *, page_size: int, max_entries: int = MAX_ENTRIES) -> None:
        self._page_bytes = page_size * _TOKEN_BYTES
        self._max_entries = max_entries
        self._engines: OrderedDict[bytes, int] = OrderedDict()  # digest -> bit mask of engine indices

    def __len__(self) -> int:
        return len(self._engines)

    def known(self, request: Generate) -> list[set[int]]:
        """Engines that were sent a prompt with the same beginning, the longest beginning first."""
        found = []
        for digest in reversed(self._beginnings(request)):
            mask = self._engines.get(digest, 0)
            if mask:
                found.append({index for index in range(mask.bit_length()) if mask >> index & 1})
        return found

    def learn(self, request: Generate, engine: int) -> None:
        """`engine` computes this prompt."""
        for digest in self._beginnings(request):
            self._engines[digest] = self._engines.get(digest, 0) | 1 << engine
            self._engines.move_to_end(digest)
        while len(self._engines) > self._max_entries:
            self._engines.popitem(last=False)

    def forget(self, engine: int) -> None:
        """`engine` has lost its cache."""
        kept = ((digest, mask & ~(1 << engine)) for digest, mask in self._engines.items())
        self._engines = OrderedDict((digest, mask) for digest, mask in kept if mask)

    def clear(self) -> None:
        self._engines.clear()

    def _beginnings(self, request: Generate) -> list[bytes]:
        """Digests of the first 1, 2, 4, ... whole pages; one pass over the prompt."""
        prompt, options = memoryview(request.prompt_ids), request.options
        names = f"{options.cache_salt}\0{options.extra_key}\0{options.lora_name}"
        hasher = hashlib.blake2b(names.encode(), digest_size=16)
        digests, start, depth = [], 0, 1
        while depth <= MAX_DEPTH_PAGES and (end := depth * self._page_bytes) <= len(prompt):
            hasher.update(prompt[start:end])
            digests.append(hasher.digest())
            start, depth = end, depth * 2
        return digests
