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
from headwater.messages.snapshot import GetMapNode, GetSnapshot, MapNodePath, Snapshot
from headwater.messages.state import EngineState


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
        self._survey = PrefixSurvey(cache.tree, clock)

    def take(self, message: GetSnapshot) -> Snapshot:
        return Snapshot(
            call_id=message.call_id,
            state=self._report(message.call_id),
            operations=self._control.pending.infos(),
            storage=self._storage.info(message.call_id),
            pins=self._pinning.list(GetPins(call_id=message.call_id)).items,
            map=self._survey.advance(max_nodes=message.max_nodes, num_first_ids=message.num_first_ids),
        )

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
