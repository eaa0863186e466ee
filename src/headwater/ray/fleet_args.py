"""The arguments of a fleet: its models, the number of replicas, and the arguments of their servers."""

import os
from collections.abc import Mapping
from typing import Any

import msgspec

from headwater.fleet.autoscaling import Limits
from headwater.launch.config import FLAGS, ServerArgs

_OF_FRONT = (
    "host", "port", "api_key", "admin_api_key", "allowed_origin", "allowed_host", "max_body_bytes",
    "max_control_timeout",
)  # fmt: skip
MODELS = "models"


class FleetArgs(msgspec.Struct, frozen=True, kw_only=True):
    """Of one model. `server`: of every replica; host, keys and limits are those of the front."""

    replicas: int = 2
    cpus: float = 1.0  # of each replica, as Ray counts them
    gpus: float = 0.0
    drain_s: float = 600.0  # within which the running requests of a replica that leaves may end
    drain_persists: bool = True  # a replica that leaves copies what it has cached to the store
    min_replicas: int = 1  # of a fleet that scales itself
    max_replicas: int | None = None  # None: it does not
    target_ongoing_requests: float = 8.0
    upscale_after_s: float = 3.0
    downscale_after_s: float = 60.0
    is_local: bool = False  # on this machine alone: replicas listen on the loopback address
    server: ServerArgs = ServerArgs()

    def __post_init__(self) -> None:
        if not 1 <= self.replicas <= 1000:
            raise ValueError(f"replicas must be from 1 to 1000, got {self.replicas}")
        if self.limits is not None and self.limits.clamp(self.replicas) != self.replicas:
            raise ValueError(f"replicas must be from min_replicas to max_replicas, got {self.replicas}")
        if self.cpus < 0 or self.gpus < 0 or self.drain_s < 0:
            raise ValueError("cpus, gpus and drain_s must not be negative")
        if self.server.dp_size != 1:
            raise ValueError("a replica of a fleet has one engine: --dp-size must be 1; take more replicas")
        if self.server.stage_weights_on_gpu != "auto":
            raise ValueError("--stage-weights-on-gpu: the front of a fleet receives tensors, and it has no GPU")
        endpoints = (self.server.kv_events_endpoint, self.server.kv_events_replay_endpoint)
        if any(each is not None and not each.startswith("tcp://") for each in endpoints):
            raise ValueError("--kv-events-endpoint must begin with tcp:// in a fleet: each replica takes a free port")

    @property
    def limits(self) -> Limits | None:
        """Of a fleet that scales itself. ValueError if they contradict each other."""
        if self.max_replicas is None:
            return None
        return msgspec.convert(self, Limits, from_attributes=True)


def _from_environment() -> dict[str, str]:
    """Arguments that `headwater serve` takes from the environment: keys, which stand in no file."""
    variables = {name: spec.flag.env for name, spec in FLAGS.items() if spec.flag.env}
    return {name: os.environ[variable] for name, variable in variables.items() if variable in os.environ}


def read_fleet_args(given: Mapping[str, Any]) -> FleetArgs:
    """From names and values, as `serve run` and Serve's YAML files have them; numbers may be text. ValueError."""
    given = _from_environment() | dict(given)
    own = {name: value for name, value in given.items() if name in FleetArgs.__struct_fields__ and name != "server"}
    server = {name.replace("-", "_"): value for name, value in given.items() if name not in own}
    unknown = sorted(set(server) - set(FLAGS))
    if unknown:
        raise ValueError(f"a fleet has no argument {unknown[0]!r}; it takes those of `headwater serve` and of itself")
    try:
        args = msgspec.convert(server, ServerArgs, strict=False)
        return msgspec.convert({**own, "server": args}, FleetArgs, strict=False)
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from None


def check_served_by_serve(given: Mapping[str, Any]) -> None:
    """ValueError if `given` names where to listen: Ray Serve itself does, not the application."""
    for name in ("host", "port"):
        if name in given:
            raise ValueError(f"{name}: Ray Serve listens for the fleet; set it in Serve's http_options")


def read_models(given: Mapping[str, Any]) -> dict[str, FleetArgs]:
    """By the name of the model; "" if there is no `models`: a fleet of one model. ValueError.

    Each entry of `models` has a `name`, and arguments that go before those of `given`.
    """
    common = dict(given)
    listed = common.pop(MODELS, None)
    if listed is None:
        return {"": read_fleet_args(common)}
    if not isinstance(listed, list) or not listed or not all(isinstance(each, Mapping) for each in listed):
        raise ValueError("models must be a list of mappings: a name, and the arguments of that model")
    models: dict[str, FleetArgs] = {}
    for each in listed:
        own = dict(each)
        name = own.pop("name", None)
        if not isinstance(name, str) or not name or name in models:
            raise ValueError(f"models: each needs a name of its own, got {name!r}")
        own.setdefault("served_model_name", name)
        if own["served_model_name"] != name:
            raise ValueError(f"models: {name}: served_model_name must be the name")
        models[name] = _named(name, common | own)
    _require_one_front(models)
    return models


def _named(name: str, given: Mapping[str, Any]) -> FleetArgs:
    try:
        return read_fleet_args(given)
    except ValueError as error:
        raise ValueError(f"models: {name}: {error}") from None


def _require_one_front(models: Mapping[str, FleetArgs]) -> None:
    first = next(iter(models.values()))
    for name, args in models.items():
        for field in _OF_FRONT:
            if getattr(args.server, field) != getattr(first.server, field):
                raise ValueError(f"models: {name}: {field} is the front's; give it once for all models")
