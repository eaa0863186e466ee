"""Fronts that are wrong on purpose: each breaks one promise, and names the test that has to notice it.

The mutants of `headwater.simulation.mutants` are judged by random runs. These stand above the simulation, in the front.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import msgspec
import test_fleet_client
import test_front
import test_lost_messages
import test_proxy
import test_several_models
import test_tensors

from headwater.client.fleet import Fleet
from headwater.client.fleet_driver import FleetDriver
from headwater.client.relayed_calls import RelayedCalls
from headwater.client.standing import Standing
from headwater.fleet import client as client_module
from headwater.fleet import merging as merging_module
from headwater.fleet import models as models_module
from headwater.fleet import proxy as proxy_module
from headwater.fleet import replica as replica_module
from headwater.fleet.carrying import Carrying
from headwater.fleet.client import FleetClient
from headwater.fleet.merging import Taken
from headwater.fleet.models import ModelsFront
from headwater.fleet.proxy import Proxy
from headwater.generation.errors import ApiError
from headwater.generation.model_facts import ModelFacts
from headwater.messages.control import FlushCache
from headwater.simulation.mutants.fleet import FLEET_MUTANTS
from headwater.simulation.mutants.registry import MakePatches, Mutant, mutant
from headwater.simulation.mutants.transports import TRANSPORT_MUTANTS

Check = Callable[..., Any]  # a test, whose arguments are fixtures of its module
FRONT_MUTANTS: dict[str, Mutant] = {}
NOTICED_BY: dict[str, Check] = {}


def front_mutant(check: Check) -> Callable[[MakePatches], MakePatches]:
    register = mutant(profile="front", into=FRONT_MUTANTS)

    def register_both(make_patches: MakePatches) -> MakePatches:
        NOTICED_BY[make_patches.__name__] = check
        return register(make_patches)

    return register_both


# --- a request goes to one replica, and to one other at most --------------------------------------------


@front_mutant(test_proxy.test_a_request_that_ends_its_replicas_ends_two_of_them_and_no_third)
def every_replica_is_tried() -> list[Any]:
    """A request that broke its replica is tried on one replica after another."""
    return [(proxy_module, "MAX_BROKEN", 99)]


@front_mutant(test_proxy.test_a_request_that_broke_is_retried_once_past_replicas_that_it_cannot_reach)
def nothing_is_retried() -> list[Any]:
    """A request that broke its replica is tried on no other one."""
    return [(proxy_module, "MAX_BROKEN", 1)]


@front_mutant(test_proxy.test_a_request_never_comes_back_to_a_replica_that_it_broke)
def what_broke_a_replica_comes_back() -> list[Any]:
    """A request goes a second time to the replica that it broke."""
    return [(proxy_module._Tries, "may_take", lambda self, number: number not in self.tried)]


@front_mutant(test_proxy.test_a_request_that_broke_is_retried_once_past_replicas_that_it_cannot_reach)
def what_was_not_sent_counts_as_broken() -> list[Any]:
    """A replica that takes no connection counts as one that the request broke."""
    return [(proxy_module, "NotConnected", type("NeverRaised", (ConnectionError,), {}))]


@front_mutant(test_proxy.test_a_request_that_ends_its_replicas_ends_two_of_them_and_no_third)
def clients_repeat_what_broke() -> list[Any]:
    """The answer to a request that broke two replicas does not forbid clients to send it again."""
    right = proxy_module._breaks

    def breaks(numbers: list[int]) -> ApiError:
        error = right(numbers)
        error.headers["x-should-retry"] = "true"
        return error

    return [(proxy_module, "_breaks", breaks)]


@front_mutant(test_proxy.test_a_stream_that_breaks_ends_with_an_error_event)
def what_has_begun_is_begun_anew() -> list[Any]:
    """A request whose answer broke off is sent to a replica again."""
    right = Proxy._answer

    async def answer(self: Proxy, scope: Any, body: bytes, send: Any) -> None:
        parts: list[bytes] = []

        async def watch(message: Any) -> None:
            parts.append(message.get("body", b""))
            await send(message)

        async def go_on(message: Any) -> None:
            if "body" in message:
                await send(message)

        await right(self, scope, body, watch)
        if any(proxy_module.GONE.encode() in part for part in parts):
            await right(self, scope, body, go_on)

    return [(Proxy, "_answer", answer)]


@front_mutant(test_proxy.test_a_stream_that_breaks_ends_with_an_error_event)
def a_broken_stream_looks_whole() -> list[Any]:
    """A stream whose replica has ended closes as if it were whole."""
    return [(proxy_module, "_broken", lambda replica: b"data: [DONE]\n\n")]


# --- a replica that starts late, or comes back ----------------------------------------------------------


def front_shares(name: str, check: Check, *, among: dict[str, Mutant] = FLEET_MUTANTS) -> None:
    """A mutant of the parts that a front shares with a server of several engines."""
    FRONT_MUTANTS[name], NOTICED_BY[name] = among[name], check


_joins = test_fleet_client.test_a_replica_that_joins_is_brought_to_the_state_of_the_fleet
front_shares("a_new_process_serves_at_once", _joins)
front_shares("the_pause_is_not_brought_back", _joins)
front_shares(
    "weights_are_not_brought_back", test_tensors.test_a_replica_that_comes_later_gets_the_tensors_before_it_serves
)
front_shares(
    "adapters_are_not_brought_back",
    test_front.test_adapters_are_loaded_by_all_replicas_and_by_those_that_come_later,
)


@front_mutant(test_fleet_client.test_a_replica_that_another_front_has_used_flushes_before_it_serves)
def what_an_earlier_front_owed_is_forgotten() -> list[Any]:
    """A replica that an earlier front has used serves with the pages of that time."""
    right = Fleet.join
    return [(Fleet, "join", lambda self, *, owes=None: right(self))]


@front_mutant(test_fleet_client.test_a_front_that_is_restarted_takes_over_the_state_and_the_newest_one_wins)
def the_first_word_counts() -> list[Any]:
    """A front that is restarted takes the state of the first replica that it meets, however old it is."""
    right = FleetDriver.adopt

    def adopt(self: FleetDriver, desired: Any) -> None:
        if self.fleet.desired is None:
            right(self, desired)

    return [(FleetDriver, "adopt", adopt)]


@front_mutant(test_fleet_client.test_a_change_outlives_a_front_that_ends_before_any_replica_has_heard_of_it)
def the_state_before_a_change_is_kept() -> list[Any]:
    """The front answers a change and keeps the state from before it."""
    right = FleetClient.change

    async def change(self: FleetClient, message: Any, **more: Any) -> Any:
        before, keep = self._encoded_desired(), self._keep
        self._keep = None if keep is None else lambda after: keep(before)
        try:
            return await right(self, message, **more)
        finally:
            self._keep = keep

    return [(FleetClient, "change", change)]


@front_mutant(test_lost_messages.test_a_beat_that_comes_after_the_end_of_its_replica_makes_no_other_one)
def who_has_ended_joins_again() -> list[Any]:
    """A late message of a replica that has ended makes another one of it."""
    right = FleetClient.take_beat

    def take_beat(self: FleetClient, beat: Any) -> Any:
        self._ended.clear()
        return right(self, beat)

    return [(FleetClient, "take_beat", take_beat)]


# --- one answer that is true ----------------------------------------------------------------------------


front_shares(
    "the_unconfirmed_serve_on",
    test_fleet_client.test_a_replica_that_misses_the_commit_is_pending_and_fenced_until_it_has_caught_up,
)


@front_mutant(test_fleet_client.test_a_replica_that_cannot_be_reached_is_pending_and_serves_only_after_its_flush)
def a_missed_flush_is_not_made_up_for() -> list[Any]:
    """A replica that missed a flush serves again without having made it."""
    return [(Standing, "owe", lambda self, flush: None)]


@front_mutant(test_fleet_client.test_a_dry_run_and_a_flush_that_was_made_nowhere_leave_nothing_owed)
def a_dry_run_is_owed() -> list[Any]:
    """A replica that missed a dry run is fenced until it has made it."""
    right = client_module.settle

    def settle(flush: FlushCache, answers: Any, **more: Any) -> Any:
        return right(msgspec.structs.replace(flush, dry_run=False), answers, **more)

    return [(client_module, "settle", settle)]


@front_mutant(test_lost_messages.test_a_replica_that_ended_during_a_flush_is_not_pending)
def who_has_ended_is_pending() -> list[Any]:
    """A replica that has ended, and its memory with it, is still waited for."""
    right = client_module.settle

    def settle(flush: FlushCache, answers: Any, *, members: Iterable[int], gone: Any) -> Any:
        return right(flush, answers, members=members)

    return [(client_module, "settle", settle)]


@front_mutant(test_fleet_client.test_only_one_replica_raises_the_generation_of_a_shared_store)
def every_replica_raises_the_store() -> list[Any]:
    """A flush of a shared store is sent to it by every replica."""
    return [(client_module, "is_raised", lambda result: False)]


@front_mutant(test_fleet_client.test_a_store_that_has_not_acknowledged_is_barred_by_every_replica)
def a_silent_store_counts_as_flushed() -> list[Any]:
    """A shared store that has not acknowledged a flush counts as flushed for the other replicas."""
    return [(client_module, "is_raised", lambda result: True)]


@front_mutant(partial(test_lost_messages.test_a_flush_that_got_lost_is_repeated_inside_its_deadline, lost="answer"))
def a_repeated_call_is_made_again() -> list[Any]:
    """A call that comes a second time, since its answer got lost, is made a second time."""

    async def answer(self: RelayedCalls, message: Any) -> Any:
        return await self._relay(message)

    return [(RelayedCalls, "answer", answer)]


@front_mutant(partial(test_lost_messages.test_a_flush_that_got_lost_is_repeated_inside_its_deadline, lost="message"))
def a_lost_message_is_not_repeated() -> list[Any]:
    """A call whose message got lost is not sent again."""
    return [(replica_module, "_FIRST_REPEAT_S", (60.0, 60.0))]


# --- tensors and brackets: all or none ------------------------------------------------------------------


_bracket = test_tensors.test_a_bracket_is_put_in_place_by_all_or_none
front_shares("a_bucket_is_applied_before_the_end", _bracket, among=TRANSPORT_MUTANTS)
front_shares("the_first_to_be_ready_decides", _bracket)
front_shares(
    "a_refusal_is_overheard", test_tensors.test_a_replica_without_room_for_the_tensors_means_that_none_takes_them
)


@front_mutant(test_tensors.test_tensors_are_carried_to_replicas_on_other_machines)
def tensors_are_not_carried() -> list[Any]:
    """A replica on another machine is sent the path of the front's own files."""

    async def with_own_path(self: Carrying, message: Any, to: Any) -> Any:
        return message

    return [(Carrying, "with_own_path", with_own_path)]


@front_mutant(test_tensors.test_a_replica_keeps_what_it_may_read_again_and_nothing_else)
def tensors_in_use_are_deleted() -> list[Any]:
    """A replica deletes the tensors that it serves when the next ones are carried to it."""
    return [(FleetClient, "_received_ids", lambda self: [])]


# --- several models -------------------------------------------------------------------------------------


_named = test_several_models.test_a_flush_is_made_by_all_models_or_by_the_one_that_is_named
_no_success = test_several_models.test_what_one_model_has_not_done_is_no_success_of_all
_has_to_name = test_several_models.test_what_concerns_one_model_has_to_name_it


@front_mutant(_named)
def a_named_call_goes_to_all() -> list[Any]:
    """A control call whose query names a model goes to all models."""
    right = models_module._named_outside
    return [(models_module, "_named_outside", lambda scope: (None, right(scope)[1]))]


@front_mutant(_named)
def a_name_in_the_body_is_overheard() -> list[Any]:
    """A control call whose body names a model goes to all models."""
    return [(models_module, "_name_in", lambda body: None)]


@front_mutant(test_several_models.test_a_request_for_no_model_is_refused_by_name)
def an_unknown_model_is_the_first() -> list[Any]:
    """A call about a model that is not served goes to the first one."""
    right = ModelsFront._front

    def front(self: ModelsFront, name: str) -> Any:
        try:
            return right(self, name)
        except ApiError:
            return next(iter(self.fronts.values()))

    return [(ModelsFront, "_front", front)]


@front_mutant(test_front.test_a_call_about_another_model_reaches_no_replica)
def the_only_model_is_every_model() -> list[Any]:
    """A fleet of one model carries out calls about another one."""
    return [(ModelFacts, "require", lambda self, name: None)]


@front_mutant(_has_to_name)
def what_concerns_one_goes_to_all() -> list[Any]:
    """A change of weights that names no model goes to all models."""
    return [(models_module, "_OF_ONE_MODEL", ())]


@front_mutant(_has_to_name)
def a_taken_name_is_given_again() -> list[Any]:
    """An adapter gets the name of another model, whose requests it then takes."""
    return [(ModelsFront, "_refuse_taken", lambda self, body, *, model: None)]


@front_mutant(_no_success)
def one_success_is_enough() -> list[Any]:
    """A control call over several models is a success if one model said so."""
    right = merging_module._merged_facts

    def merged_facts(facts: Any, answers: Any) -> Any:
        return right(facts, answers) | {"success": any(each.get("success") for each in facts.values())}

    return [(merging_module, "_merged_facts", merged_facts)]


@front_mutant(_no_success)
def the_best_status_counts() -> list[Any]:
    """The status of a control call over several models is that of the model which did best."""
    right = models_module.merged

    def merged(path: str, answers: Any) -> Taken:
        found = right(path, answers)
        return Taken(min(each.status for each in answers.values()), found.headers, found.body)

    return [(models_module, "merged", merged)]


@front_mutant(_no_success)
def a_success_comes_first() -> list[Any]:
    """The text of an answer over several models begins with a success, though another model has none."""

    def texts(answers: Any) -> bytes:
        best_first = sorted(answers.items(), key=lambda item: item[1].status)
        return "".join(f"{each.body.decode().strip()} ({name})\n" for name, each in best_first).encode()

    return [(merging_module, "_merged_texts", texts)]
