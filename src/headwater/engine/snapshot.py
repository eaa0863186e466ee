"""Answers the calls of those who watch an engine: a snapshot, and the tokens of a node on its map."""

from collections.abc import Callable

from headwater.cache.prefix_cache import PrefixCache
from headwater.clock import Clock
from headwater.control.control_plane import ControlPlane
from headwater.control.pinning import Pinning
from headwater.control.storage_control import StorageControl
from headwater.engine.prefix_survey import PrefixSurvey
from headwater.messages.base import pack_ids
from headwater.messages.cache import GetPins
from headwater.messages.control import Failed
from headwater.messages.snapshot import GetMapNode, GetSnapshot, MapNodePath, PrefixMap, Snapshot
from headwater.messages.state import EngineState

_FRESH_S = 2.5  # a map of this age is shown again, unless something was flushed


class Snapshots:
    """Takes snapshots between two turns. Costs nothing while none is asked for."""

    def __init__(
        self,
        *,
        cache: PrefixCache,
        report: Callable[[str], EngineState],
        control: ControlPlane,
        storage: StorageControl,
        pinning: Pinning,
        clock: Clock,
    ) -> None:
        self._cache = cache
        self._report = report
        self._control = control
        self._storage = storage
        self._pinning = pinning
        self._clock = clock
        self._survey = PrefixSurvey(cache.tree, clock)
        self._drawn_at_s = float("-inf")
        self._drawn_for: tuple[int, ...] = ()  # what the newest map was made for

    def take(self, message: GetSnapshot) -> Snapshot:
        return Snapshot(
            call_id=message.call_id,
            state=self._report(message.call_id),
            operations=self._control.pending.infos(),
            storage=self._storage.info(message.call_id),
            pins=self._pinning.list(GetPins(call_id=message.call_id)).items,
            map=self._map(message),
        )

    def _map(self, message: GetSnapshot) -> PrefixMap:
        wanted = (message.max_nodes, message.num_first_ids, self._cache.generation)
        is_fresh = wanted == self._drawn_for and self._clock.now() - self._drawn_at_s < _FRESH_S
        if is_fresh and self._survey.is_at_rest:
            return self._survey.map
        found = self._survey.advance(max_nodes=message.max_nodes, num_first_ids=message.num_first_ids)
        if self._survey.is_at_rest:
            self._drawn_at_s, self._drawn_for = self._clock.now(), wanted
        return found

    def path(self, message: GetMapNode) -> MapNodePath | Failed:
        node = self._survey.node(message.number)
        if node is None:
            text = f"node {message.number} is not in the tree any more"
            return Failed(call_id=message.call_id, status=404, message=text, param="number")
        path = self._cache.tree.path(node)
        num_above = len(path) - len(node.tokens)
        return MapNodePath(
            call_id=message.call_id,
            cache_salt=node.namespace.cache_salt,
            extra_key=node.namespace.extra_key,
            path_ids=pack_ids(path),
            flush_ids=pack_ids(path[: num_above + self._cache.page_size]),
        )
