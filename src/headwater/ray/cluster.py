"""A fleet on this machine: Ray, Serve and the application, started and ended together."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# types are checked where Ray is not installed

import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.config import HTTPOptions

from headwater.fleet.local_fleet import LocalFleet
from headwater.ray.application import build
from headwater.ray.fleet_args import FleetArgs

APP = "headwater"
_MORE_CPUS = 64  # for replicas that join later: this machine's scheduler shares the cores, not Ray


def up(models: Mapping[str, FleetArgs], *, state_file: Path, on_ready: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM. Then everything that was started has ended. RuntimeError if it cannot start."""
    _on_signals(_interrupt)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")  # else it starts an idle process for each CPU
    first = next(iter(models.values())).server
    host, port = first.host, first.port
    try:
        ray.init(
            num_cpus=max(1, round(sum(args.cpus * args.replicas for args in models.values()))) + _MORE_CPUS,
            include_dashboard=False,
            log_to_driver=first.log_level in ("debug", "info"),
            namespace=APP,
        )
        _on_signals(_interrupt)  # again: Ray has put its own in place, which abort
        LocalFleet(os.getpid(), f"http://{host}:{port}").write(state_file)
        serve.start(http_options=HTTPOptions(host=host, port=port))
        serve.run(build(models), name=APP, route_prefix="/", external_scaler_enabled=True)
        on_ready(f"http://{host}:{port}")
        while True:
            signal.pause()
    except KeyboardInterrupt:
        pass
    finally:
        _on_signals(signal.SIG_IGN)  # the end is on its way
        state_file.unlink(missing_ok=True)
        if ray.is_initialized():
            serve.shutdown()
            ray.shutdown()


def _on_signals(handler: Any) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt
