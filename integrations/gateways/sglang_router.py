"""`sglang-router` in front of two servers."""

from checks import run_checks
from gateways.gateway import Gateway, declare_checks, python_module

if __name__ == "__main__":
    declare_checks(
        Gateway(
            *python_module("sglang_router.launch_router"),
            *("--host", "127.0.0.1", "--port", "{port}", "--prometheus-port", "{metrics}", "--policy", "cache_aware"),
        )
    )
    run_checks()
