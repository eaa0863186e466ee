"""The arguments of a fleet, as Serve's files and command line give them; and the manifest for Kubernetes."""

from pathlib import Path

import pytest
import yaml

from headwater.ray.fleet_args import check_served_by_serve, read_fleet_args, read_models
from headwater.ray.models_file import read_models_file

ROOT = Path(__file__).parents[2]


def test_values_may_be_text_and_names_those_of_the_command_line() -> None:
    args = read_fleet_args({"replicas": "3", "gpus": "0.5", "model": "m", "enable-hierarchical-cache": "true"})
    assert (args.replicas, args.gpus, args.server.model) == (3, 0.5, "m")
    assert args.server.enable_hierarchical_cache is True


def test_keys_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADWATER_ADMIN_API_KEY", "secret")
    assert read_fleet_args({}).server.admin_api_key == "secret"
    assert read_fleet_args({"admin_api_key": "given"}).server.admin_api_key == "given"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"replicas": 0}, "replicas must be from 1"),
        ({"replicas": "many"}, "int"),
        ({"modell": "m"}, "'modell'"),
        ({"dp_size": 2}, "--dp-size must be 1"),
        ({"page_size": -1}, "--page-size"),
        ({"stage_weights_on_gpu": "never"}, "--stage-weights-on-gpu"),
        ({"kv_events_endpoint": "ipc:///tmp/events"}, "tcp://"),
    ],
)
def test_what_is_wrong_is_named(given: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_fleet_args(given)


def test_models_have_a_name_arguments_of_their_own_and_the_others_in_common(tmp_path: Path) -> None:
    file = tmp_path / "models.yaml"
    file.write_text("- {name: small, model: s, replicas: 3}\n- {name: large, model: l, gpus: 2, page-size: 32}\n")
    models = read_models({"models": read_models_file(file), "port": 8000, "gpus": 1})
    assert list(models) == ["small", "large"]
    small, large = models.values()
    assert (small.replicas, small.gpus, small.server.model, small.server.served_model_name) == (3, 1, "s", "small")
    assert (large.replicas, large.gpus, large.server.page_size, large.server.port) == (2, 2, 32, 8000)
    assert list(read_models({"model": "s"})) == [""]


@pytest.mark.parametrize(
    ("models", "words"),
    [
        ([], "a list of mappings"),
        ([{"model": "m"}], "a name of its own"),
        ([{"name": "a"}, {"name": "a"}], "a name of its own"),
        ([{"name": "a", "modell": "m"}], "models: a: .*'modell'"),
        ([{"name": "a"}, {"name": "b", "port": 1234}], "models: b: port is the front's"),
        ([{"name": "a", "served_model_name": "b"}], "models: a: served_model_name"),
    ],
)
def test_what_is_wrong_with_a_model_is_named(models: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_models({"models": models})


@pytest.mark.parametrize("name", ["host", "port"])
def test_where_serve_listens_is_no_argument_of_the_application(name: str) -> None:
    """It would be ignored."""
    check_served_by_serve({"model": "m"})
    with pytest.raises(ValueError, match=f"{name}: .*http_options"):
        check_served_by_serve({"model": "m", name: "8000"})


def test_the_manifest_names_arguments_that_exist_and_leaves_time_to_drain() -> None:
    service, *store = yaml.safe_load_all((ROOT / "deploy" / "kuberay.yaml").read_text())
    (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    args = read_fleet_args(application["args"])
    assert application["import_path"] == "headwater.ray:app"
    (workers,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    (container,) = workers["template"]["spec"]["containers"]
    assert args.gpus == float(container["resources"]["limits"]["nvidia.com/gpu"])
    assert workers["template"]["spec"]["terminationGracePeriodSeconds"] > args.drain_s
    assert args.server.hicache_storage_url is not None
    assert store[0]["metadata"]["name"] in args.server.hicache_storage_url
