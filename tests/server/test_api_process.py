"""What is said on the command line is what holds for connections and web pages."""

from headwater.http_api.connection import ConnectionLimits
from headwater.launch.config import ServerArgs
from headwater.server.api_process import connection_limits, site_policy
from headwater.server.descriptors import default_max_connections, raise_descriptor_limit


def test_connections_are_bounded_as_the_flags_say() -> None:
    limits = connection_limits(
        ServerArgs(max_connections=7, max_header_bytes=2048, header_timeout=1.5, keep_alive_timeout=9)
    )
    assert limits == ConnectionLimits(7, 2048, 1.5, 9)


def test_by_default_connections_leave_descriptors() -> None:
    limits = connection_limits(ServerArgs())
    assert limits.max_connections == default_max_connections(raise_descriptor_limit())
    assert (limits.max_header_bytes, limits.header_timeout_s) == (64 << 10, 10.0)
    assert limits.keep_alive_s > 60, "load balancers keep connections for a minute"


def test_names_are_checked_on_a_local_server_without_a_key() -> None:
    assert site_policy(ServerArgs()).checks_host
    assert not site_policy(ServerArgs(host="0.0.0.0")).checks_host
    assert not site_policy(ServerArgs(api_key="k")).checks_host
    assert site_policy(ServerArgs(admin_api_key="k")).checks_host, "generating needs no key"
    assert site_policy(ServerArgs(host="0.0.0.0", allowed_host="gpu.example")).checks_host


def test_origins_and_names_of_the_flags_are_allowed() -> None:
    policy = site_policy(ServerArgs(allowed_origin="https://A.example/", allowed_host="GPU.example"))
    assert policy.allowed_origins == {"https://a.example"}
    assert {"gpu.example", "127.0.0.1"} <= policy.allowed_hosts
