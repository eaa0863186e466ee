"""The expected reads of every step and the expected answers to every client, derived from the requests alone."""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import numpy.typing as npt

from headwater.messages.generation import Generate, Output
from headwater.scheduling.limits import SchedulerLimits
from headwater.scheduling.plan import SlotAssignment
from headwater.scheduling.request import Request
from headwater.simulation.checks.adapter_promises import AdapterPromises
from headwater.simulation.checks.grammar_promises import GrammarPromises
from headwater.simulation.checks.request_model import RequestKey, RequestModel
from headwater.simulation.checks.violation import Violation, demand
from headwater.simulation.fakes.kv_records import Records
from headwater.simulation.fakes.memory import FakeWeights
from headwater.simulation.fakes.runner import check_written
from headwater.simulation.fakes.shared_world import KvSequence, SharedWorld


class Oracle:
    """`fakes.step_audit.StepAudit`: compares each step's reads and each answer with models of the requests.

    A model follows its request through the slots. The engine's launches determine which weights compute a position; the
    model derives everything else (tokens, canaries, the end of the text) itself.
    """

    def __init__(
        self,
        world: SharedWorld,
        *,
        page_size: int,
        vocab_size: int,
        limits: SchedulerLimits,
        capacity_tokens: int,
        eos_token_ids: frozenset[int],
        weights: FakeWeights,
        running: Callable[[], Iterable[Request]],
        pages_of: Callable[[int, int], Records],
        records: Callable[[npt.NDArray[np.integer]], Records],
        is_shared: Callable[[int], bool],
        now_s: Callable[[], float],
        grammars: GrammarPromises,
        adapters: AdapterPromises,
    ) -> None:
        self.active: dict[RequestKey, RequestModel] = {}
        self.entered_now: list[RequestModel] = []  # in this turn; `ControlPromises` clears it
        self.num_pages_reused = 0
        self.num_parts_copied = 0
        self.num_undelivered = 0  # of those that are active
        self._num_delivered = 0
        self._failed: list[RequestModel] = []  # in this turn
        self._num_refusals_due: dict[RequestKey, int] = {}  # for requests whose rid is in use
        self._world = world
        self._page_size = page_size
        self._vocab_size = vocab_size
        self._limits = limits
        self._capacity_tokens = capacity_tokens
        self._eos_token_ids = eos_token_ids
        self._weights = weights
        self._running = running
        self._pages_of = pages_of  # contents of the first pages of a slot
        self._records = records  # contents of pages
        self._now_s = now_s
        self._grammars = grammars
        self._adapters = adapters
        self._is_shared = is_shared  # whether a page is in the tree
        self._slots: dict[int, RequestModel] = {}

    @property
    def turn(self) -> int:
        return self._world.turn

    # --- messages and outputs of clients ------------------------------------------------------------

    def sent(self, client: bytes, message: Generate) -> None:
        """A client has sent a request, which the engine will read in its next turn."""
        key = (client, message.rid)
        if key in self.active:
            self._num_refusals_due[key] = self._num_refusals_due.get(key, 0) + 1
            return
        sampling = message.sampling
        stop_ids = frozenset(sampling.stop_token_ids)
        model = RequestModel(
            key,
            message,
            room=min(self._limits.max_context, self._capacity_tokens),
            stop_ids=stop_ids if sampling.ignore_eos else stop_ids | self._eos_token_ids,
            vocab_size=self._vocab_size,
            end_ids=self._eos_token_ids,
        )
        self.active[key] = model
        self.num_undelivered += 1

    def delivered(self, client: bytes, message: Generate) -> None:
        """The engine reads a request now."""
        if (client, message.rid) not in self.active:
            self.sent(client, message)
        model = self.active[client, message.rid]
        if not model.is_delivered:  # else another request has its rid
            model.number = self._num_delivered
            self._num_delivered += 1
            self.num_undelivered -= 1
            model.is_delivered = True
            model.arrived_s = self._now_s()

    def received(self, client: bytes, output: Output) -> None:
        """A client has received an output."""
        key = (client, output.rid)
        if output.finish is not None and output.finish.status == 400 and self._num_refusals_due.get(key):
            self._num_refusals_due[key] -= 1
            return
        model = self.active.get(key)
        if model is None:
            raise Violation("answered_once", f"{output.rid} got an output before its start or after its end")
        if model.grammar is not None and output.finish is not None and output.finish.status == 400:
            model.is_grammar_refused = self._grammars.is_refused(model.grammar.text)
        model.received(output)
        if output.finish is not None and output.finish.status == 404:
            self._adapters.refused(model)
        if output.finish is not None:
            del self.active[key]
            self._follow(model)

    def _follow(self, model: RequestModel) -> None:
        """A request was refused, and another was read under its rid before the client knew: that one is next."""
        if not model.followers:
            return
        client, _ = model.key
        (message, must_be_refused), *others = model.followers
        self._num_refusals_due[model.key] -= 1
        self.sent(client, message)
        self.delivered(client, message)
        follower = self.active[model.key]
        follower.is_refused = follower.must_be_refused = must_be_refused
        follower.followers = others

    # --- reports of steps ---------------------------------------------------------------------------

    def invalidated(self, slot: int) -> None:
        self._slots[slot].is_invalid = True

    def failed(self, slots: set[int]) -> None:
        """The step of the requests in `slots` raises: exactly these requests end with an error in this turn."""
        for request in self._running():
            if request.slot in slots:
                model = self.active[request.client, request.rid]
                model.has_failed = True
                self._failed.append(model)

    def check_failed(self) -> None:
        """After a turn, all requests whose step raised have ended."""
        for model in self._failed:
            if self.active.get(model.key) is model:
                raise Violation("failed_steps_end_their_own", f"{model.rid} goes on after its step has raised")
        self._failed.clear()

    def entered(self, assignment: SlotAssignment, num_cached: int) -> tuple[str, int]:
        request = next(each for each in self._running() if each.slot == assignment.slot)
        model = self.active.get((request.client, request.rid))
        if model is None:
            raise Violation("only_the_living_run", f"{request.rid} enters a slot after it has ended")
        message = model.message
        if model.grammar is not None and model.grammar.text:
            self._grammars.check_compiled(model.grammar.text)
        known = assignment.token_ids.tolist()
        if not model.may_enter_with(known):
            raise Violation("right_tokens_computed", f"{request.rid} enters with other tokens")
        demand(num_cached < max(1, len(known)), "one_token_is_computed", request.rid)
        self._adapters.entered(model, assignment.adapter)
        weights = self._weights.current
        options = message.options
        sequence = KvSequence(
            message.rid, options.cache_salt, options.extra_key, options.no_store, known, weights, model.adapter
        )
        model.enter(known, num_cached, weights=weights)
        self._slots[assignment.slot] = model
        self.entered_now.append(model)
        return model.base_namespace, self._world.add_sequence(sequence)

    def pages_changed(self, slot: int, first: int, pages: npt.NDArray[np.integer]) -> None:
        model = self._slots[slot]
        num_pages = model.num_kv // self._page_size - first  # pages with KV that the request will read
        if num_pages <= 0:
            return
        read = self._records(pages[:num_pages])
        self.num_pages_reused += len(read)
        self._check_reused(model, read)

    def copied(self, slot: int, source: int, read: Records) -> None:
        model = self._slots[slot]
        demand(self._is_shared(source), "copy_source_kept", f"{model.rid} copies out of a page that is not cached")
        is_part = len(read) == model.num_kv % self._page_size
        demand(is_part, "kv_is_its_own", f"{model.rid} copies {len(read)} tokens to begin at {model.num_kv}")
        self.num_parts_copied += 1
        self._check_reused(model, read[None])

    def computed(
        self, slot: int, first: int, tokens: list[int], *, read: bytes, noise_at: int | None, is_draft: bool
    ) -> None:
        model = self._slots[slot]
        if model.is_invalid or model.is_stray(first, tokens, is_draft=is_draft):
            return
        if first != model.num_kv:
            raise Violation("positions_in_order", f"{model.rid} computes {first}, has {model.num_kv}")
        right = model.tokens[first : first + len(tokens)]
        if tokens != right:
            raise Violation("right_tokens_computed", f"{model.rid} at {first}: {tokens}, not {right}")
        if not read.startswith(model.kv):
            check_written(read)
            own = np.frombuffer(model.kv, dtype=np.uint64)
            at = int(np.argmax(np.frombuffer(read, dtype=np.uint64)[:first] != own))
            raise Violation("kv_is_its_own", f"{model.rid} reads KV at position {at} of {first} that is not its own")
        model.extend(read[8 * first :], weights=self._weights.current)
        model.last_turn = self._world.turn
        if noise_at is not None:
            is_own = noise_at == len(model.tokens) - len(model.prompt)
            demand(is_own, "noise_of_its_position", f"{model.rid} samples with the noise of output {noise_at}")
            model.sample()

    def right_tokens(self, request: Request, count: int) -> list[int]:
        """The tokens that will follow those of `request`, whose tokens are all known; none if its KV is invalid."""
        model = self.active.get((request.client, request.rid))
        if model is None or model.is_invalid:
            return []
        return model.next_tokens(count, weights=self._weights.current)

    def running_keys(self) -> set[RequestKey]:
        return {(request.client, request.rid) for request in self._running()}

    def pages_in_slots(self) -> Iterator[tuple[RequestModel, Records]]:
        """For each running request, its pages with KV."""
        for request in self._running():
            model = self.active[request.client, request.rid]
            yield model, self._pages_of(request.slot, -(-model.num_kv // self._page_size))

    # ------------------------------------------------------------------------------------------------

    def _acquired_turn(self, model: RequestModel) -> int:
        """The turn in which a request acquired the pages that its table now names.

        A request that enters acquires them in this turn. A running request found them in the tree when a step was
        collected, after the launch of its last step. The report may come later, since a pause stops launches.
        """
        return self.turn if model.last_turn is None else model.last_turn

    def _check_reused(self, model: RequestModel, read: Records) -> None:
        """Pages, or a part of one, that a request takes from the cache: no flush covers them, and it may read them."""
        marks = read["retired"]
        if marks.tobytes().strip(b"\0"):  # faster than numpy's `any`
            retired = marks[(marks > 0) & (marks <= self._acquired_turn(model))]
            text = f"{model.rid} reads pages that a flush covered in turn"
            demand(not len(retired), "flushed_is_gone", f"{text} {retired.max(initial=0)}")
        self._check_owners(model, read)
        if read["drawn"].tobytes().strip(b"\0"):
            self._check_drawn(model, read)

    def _check_owners(self, model: RequestModel, read: Records) -> None:
        for number in set(read["sequence"][:, 0].tolist()):
            owner = self._world.sequence(number)
            if owner.no_store and owner.rid != model.rid:
                raise Violation("no_store", f"{model.rid} reads pages of {owner.rid}")

    def _check_drawn(self, model: RequestModel, read: Records) -> None:
        options = model.message.options
        for retirement in self._world.store_retirements:
            since = retirement.in_force_for(self)
            is_covered = retirement.covers(cache_salt=options.cache_salt, extra_key=options.extra_key)
            if since is None or not is_covered:
                continue
            old = (read["drawn"] > since) & (read["birth"] < retirement.turn)
            text = f"{model.rid} reads pages that came out of the store after it was flushed in turn {retirement.turn}"
            demand(not old.any(), "flushed_store_is_gone", text)
