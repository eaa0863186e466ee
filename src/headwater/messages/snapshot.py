"""What an operating page or a terminal shows of an engine: everything in one answer, once a second."""

from msgspec import field

from headwater.messages.base import Answer, Call, Struct
from headwater.messages.cache import PinInfo, StorageInfo
from headwater.messages.control import OperationInfo
from headwater.messages.state import EngineState


class GetSnapshot(Call, tag="get_snapshot"):
    """Answered by `Snapshot`. The map is made of a bounded number of nodes, visited over several calls if need be."""

    max_nodes: int = 300  # of the map, the largest first
    num_first_ids: int = 0  # token ids of the beginning of each node


class MapNode(Struct):
    """A node of the prefix tree with all below it."""

    number: int  # names the node in later maps as well, and in `GetMapNode`
    root: int  # index into `PrefixMap.roots`
    parent: int  # number of the node above; 0: the root
    depth: int
    num_tokens: int  # of the node alone
    below: int  # of the node and all below it
    device: int  # of these, on the device
    host: int  # and on the host
    num_hits: int
    num_pins: int  # leases and pins on the node's run on the device
    first_ids: tuple[int, ...] = ()


class MapRoot(Struct):
    """A namespace with all of its nodes, also those that the map leaves out."""

    cache_salt: str
    extra_key: str
    weights_id: str
    num_tokens: int
    device: int
    host: int
    num_nodes: int


class PrefixMap(Struct):
    """The tree as of its last complete survey. Nodes come after their parents."""

    roots: tuple[MapRoot, ...]
    nodes: tuple[MapNode, ...]
    num_left_out: int  # nodes of the tree that are in no `nodes`
    taken_s: float  # how long the survey took, from its first node to its last


class Snapshot(Answer, tag="snapshot"):
    """An engine between two turns."""

    state: EngineState
    operations: tuple[OperationInfo, ...]
    storage: StorageInfo
    pins: tuple[PinInfo, ...]
    map: PrefixMap


class GetMapNode(Call, tag="get_map_node"):
    """Ask for the tokens of a node of the last map. Answered by `MapNodePath`, or `Failed` (404)."""

    number: int


class MapNodePath(Answer, tag="map_node_path"):
    """Where a node lies. A flush of `flush_ids` in this namespace cuts the node and all below it, and no other."""

    cache_salt: str
    extra_key: str
    path_ids: bytes = field(default=b"")  # from the root to the node's end
    flush_ids: bytes = field(default=b"")  # from the root to the end of the node's first page
