"""Keeps web pages of other sites from using the server through their visitors' browsers.

A page can send requests to any address that its visitor reaches, above all to a server on localhost. It cannot read
the answers, but it can flush the cache or spend tokens. Browsers mark such requests (`Sec-Fetch-Site`, `Origin`,
`Referer`), and no page can forge these headers; programs do not send them.

With DNS rebinding a page makes its own name resolve to the server's address. The browser then takes both for one site,
and only the `Host` header shows the difference.
"""

import ipaddress
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from headwater.generation.errors import ApiError

READING = frozenset({"GET", "HEAD", "OPTIONS"})
# also an endless stream and hashes of all weights, for which the engines work
CHANGING_BY_GET = frozenset(
    {
        "/flush_cache", "/release_memory_occupation", "/resume_memory_occupation", "/health_generate",
        "/dashboard/events", "/weights_checker",
    }
)  # fmt: skip
PROBES = frozenset({"/health", "/ready", "/ping", "/metrics"})
# names that containers use for their host
OWN_NAMES = frozenset({"localhost", "host.docker.internal", "host.containers.internal"})
MAX_SHOWN = 200  # characters of a name that a client sent
DEFAULT_PORTS = (":80", ":443")


@dataclass(frozen=True, slots=True)
class SitePolicy:
    """Which sites' pages may use the server, and which names the server has."""

    allowed_origins: frozenset[str] = frozenset()  # as browsers spell them; "*": every one
    allowed_hosts: frozenset[str] = frozenset()  # without port; "*": every one
    checks_host: bool = False

    @classmethod
    def of_server(
        cls, host: str, *, has_api_key: bool, origins: tuple[str, ...] = (), hosts: tuple[str, ...] = ()
    ) -> "SitePolicy":
        """For a server that listens on `host`.

        Names are checked where rebinding threatens: on a server that only this machine reaches and that needs no key.
        Other servers have names of services and proxies that we do not know, and pages have no key. `hosts` turns the
        check on everywhere.
        """
        known = {name.lower() for name in (*hosts, host, socket.gethostname())}
        return cls(
            allowed_origins=frozenset(origin.lower().rstrip("/") for origin in origins),
            allowed_hosts=frozenset(known),
            checks_host=bool(hosts) or (is_loopback(host) and not has_api_key),
        )

    def refusal(self, method: str, path: str, headers: Mapping[str, str]) -> ApiError | None:
        """Why this request is refused, or None. Names of `headers` are in lower case."""
        path = path.rstrip("/") or "/"
        if self.checks_host and method != "OPTIONS" and path not in PROBES:
            host = headers.get("host", "")
            if not self._is_own(host_name(host)):
                name = host[:MAX_SHOWN]
                message = f"this server is not known as {name!r}; if it should be, start it with --allowed-host"
                return ApiError(403, message, code="foreign_host")
        if method in READING and path not in CHANGING_BY_GET:
            return None
        if method != "OPTIONS" and self._is_foreign_page(headers):
            page = (headers.get("origin") or headers.get("referer") or "another site")[:MAX_SHOWN]
            message = f"web pages of {page} may not use this route; to let them, start the server with --allowed-origin"
            return ApiError(403, message, code="cross_site")
        return None

    def _is_own(self, name: str) -> bool:
        if not name or name in OWN_NAMES or name.endswith(".localhost") or name in self.allowed_hosts:
            return True
        return "*" in self.allowed_hosts or is_address(name)

    def _is_foreign_page(self, headers: Mapping[str, str]) -> bool:
        origin = headers.get("origin", "").lower()
        if origin and (origin in self.allowed_origins or "*" in self.allowed_origins):
            return False
        site = headers.get("sec-fetch-site")
        if site is not None:  # the browser has compared them; behind a proxy only the browser can
            return site not in ("same-origin", "none")
        page = origin or headers.get("referer", "").lower()
        own = {_without_default_port(headers.get(name, "").lower()) for name in ("host", "x-forwarded-host")}
        return bool(page) and _authority(page) not in own - {""}


def host_name(host: str) -> str:
    """The name in a Host header, in lower case, without port, brackets and final dot."""
    name = host.strip().lower()
    if name.startswith("["):
        return name[1:].partition("]")[0]
    return name.partition(":")[0].rstrip(".")


def is_address(name: str) -> bool:
    """Whether this is an IP address, which no page can redirect to another machine."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens on `host`."""
    return host == "localhost" or (is_address(host) and ipaddress.ip_address(host).is_loopback)


def _authority(page: str) -> str | None:
    """Host and port of an origin or address; None for `null` and anything else."""
    try:
        return _without_default_port(urlsplit(page).netloc) or None
    except ValueError:
        return None


def _without_default_port(authority: str) -> str:
    for port in DEFAULT_PORTS:
        authority = authority.removesuffix(port)
    return authority
