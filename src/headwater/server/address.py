"""The address of a server, as its clients write it."""

import socket

DEFAULT_PORT = 30000
DEFAULT_URL = f"http://127.0.0.1:{DEFAULT_PORT}"


def own_url(listener: socket.socket) -> str:
    """The server's URL for a client on the same machine."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host) or str(host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
