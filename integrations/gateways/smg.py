"""`smg`, the Shepherd model gateway, in front of two servers."""

from checks import run_checks
from gateways.gateway import Gateway, declare_checks

if __name__ == "__main__":
    declare_checks(
        Gateway(
            *("smg", "launch", "--host", "127.0.0.1", "--port", "{port}", "--prometheus-port", "{metrics}"),
            *("--policy", "cache_aware"),
        )
    )
    run_checks()
