"""The Ray Serve application: one front, and for each model replicas that announce themselves to it."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# types are checked where Ray is not installed

import re
from collections.abc import Mapping
from typing import Any

import msgspec
from ray import serve
from ray.serve.schema import LoggingConfig

from headwater.ray.fleet_args import FleetArgs, check_served_by_serve, read_models
from headwater.ray.front import FrontDeployment
from headwater.ray.replica import ReplicaDeployment

FRONT, REPLICA = "Front", "Replica"
_QUIET = LoggingConfig(enable_access_log=False)  # else every beat is a line
_UNBOUNDED = 1_000_000  # the replicas' own limits decide, with answers that say so


def app(given: dict[str, Any]) -> "serve.Application":
    """The application, from `replicas`, `cpus`, `gpus`, `drain_s` and the arguments of `headwater serve`.

    `models`: a list of several models, each with a `name` and with arguments of its own.
    """
    check_served_by_serve(given)
    return build(read_models(given))


def build(models: Mapping[str, FleetArgs]) -> "serve.Application":
    """`models` by name; of a single one the name may be empty."""
    replicas = [
        _replicas(args).options(name=deployment_name(name)).bind(msgspec.json.encode(args), FRONT, name)
        for name, args in models.items()
    ]
    front = serve.deployment(
        FrontDeployment,
        name=FRONT,
        num_replicas=1,  # it owns the desired state of the fleet
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=5,
        health_check_period_s=1,
        max_ongoing_requests=_UNBOUNDED,
        logging_config=_QUIET,
    )
    return front.bind(msgspec.json.encode(models), *replicas)


def deployment_name(model: str) -> str:
    """The Ray deployment of a model's replicas."""
    return f"{REPLICA}-{re.sub(r'[^A-Za-z0-9_.-]', '-', model)}" if model else REPLICA


def _replicas(args: FleetArgs) -> "serve.Deployment":
    return serve.deployment(
        ReplicaDeployment,  # type: ignore[arg-type]
        name=REPLICA,
        num_replicas=args.replicas,
        ray_actor_options={"num_cpus": args.cpus, "num_gpus": args.gpus},
        graceful_shutdown_timeout_s=args.drain_s + 30,
        graceful_shutdown_wait_loop_s=0.1,
        health_check_period_s=1,
        max_constructor_retry_count=2,
        max_ongoing_requests=_UNBOUNDED,
        logging_config=_QUIET,
    )
