"""The arguments of a server that a fleet starts."""

from headwater.launch.config import ServerArgs
from headwater.ray.local_server import own_args


def test_a_replica_of_a_fleet_without_an_admin_key_gets_one_of_its_own():
    """`headwater fleet up` failed for everyone who gave no --admin-api-key: replicas refused to be without one."""
    args = ServerArgs(model="m", engine_restarts=3)
    one, other = (own_args(args, host="127.0.0.1", is_fleet_replica=True) for _ in range(2))
    assert one.fleet_replica and one.engine_restarts == 0
    assert one.admin_api_key and other.admin_api_key and one.admin_api_key != other.admin_api_key
    assert own_args(args, host="127.0.0.1", is_fleet_replica=False).fleet_replica is False


def test_a_given_admin_key_is_kept():
    args = ServerArgs(model="m", admin_api_key="given")
    assert own_args(args, host="127.0.0.1", is_fleet_replica=True).admin_api_key == "given"
