"""A fleet on this machine: Ray, Serve and the application, started and ended together."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve._private.common import DeploymentID
from ray.serve.config import HTTPOptions
from ray.serve.context import _get_global_client

from headwater.fleet.local_fleet import LocalFleet, running_fleet
from headwater.ray.application import REPLICA, build
from headwater.ray.fleet_args import FleetArgs

APP = "headwater"
_MORE_CPUS = 64  # for replicas that join later: this machine's scheduler shares the cores, not Ray


def up(args: FleetArgs, *, state_file: Path, on_ready: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM. Then everything that was started has ended. RuntimeError if it cannot start."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    host, port = args.server.host, args.server.port
    try:
        context = ray.init(
            num_cpus=max(1, round(args.cpus * args.replicas)) + _MORE_CPUS,
            include_dashboard=False,
            log_to_driver=args.server.log_level in ("debug", "info"),
            namespace=APP,
        )
        LocalFleet(os.getpid(), context.address_info["address"]).write(state_file)
        serve.start(http_options=HTTPOptions(host=host, port=port))
        serve.run(build(args), name=APP, route_prefix="/", external_scaler_enabled=True)
        on_ready(f"http://{host}:{port}")
        while True:
            signal.pause()
    except KeyboardInterrupt:
        pass
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # the end is on its way
        state_file.unlink(missing_ok=True)
        if ray.is_initialized():
            serve.shutdown()
            ray.shutdown()


def scale(replicas: int, *, state_file: Path) -> None:
    """Another number of replicas. Those that leave end their running requests first."""
    ray.init(address=running_fleet(state_file).address, namespace=APP, log_to_driver=False)
    try:
        client: Any = _get_global_client()
        # what Serve's own HTTP route for scaling calls; that route needs Ray's dashboard
        ray.get(client._controller.update_deployment_replicas.remote(DeploymentID(REPLICA, APP), replicas))
    finally:
        ray.shutdown()


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt
