"""The HTTP side's bounds and rules, as the server's arguments give them."""

from headwater.http_api.connection import ConnectionLimits
from headwater.http_api.sites import SitePolicy
from headwater.launch.config import ServerArgs
from headwater.server.descriptors import default_max_connections, raise_descriptor_limit


def connection_limits(args: ServerArgs) -> ConnectionLimits:
    """Bounds of every connection; how many there may be is what the limit on open files leaves room for."""
    return ConnectionLimits(
        max_connections=args.max_connections or default_max_connections(raise_descriptor_limit()),
        max_header_bytes=args.max_header_bytes,
        header_timeout_s=args.header_timeout,
    )


def site_policy(args: ServerArgs) -> SitePolicy:
    """Whose pages may use the server, and by which names it is known."""
    return SitePolicy.of_server(
        args.host,
        has_api_key=args.api_key is not None,
        origins=args.allowed_origins,
        hosts=args.allowed_hosts,
    )
