"""Server arguments: what is refused must name the flag and the range, what is shown must hide the keys."""

import math

import msgspec
import pytest

from headwater.launch.config import FLAGS, ServerArgs


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("page_size", 0, "--page-size must be an integer from 1 to 1024, got 0"),
        ("page_size", "16", "--page-size must be an integer"),
        ("page_size", True, "--page-size must be an integer"),
        ("port", 70000, "--port must be an integer from 0 to 65535"),
        ("dtype", "int8", "--dtype must be one of auto, float32, bfloat16, float16, got 'int8'"),
        ("schedule_policy", "random", "--schedule-policy must be one of fcfs, lpm"),
        ("mem_fraction_static", math.nan, "--mem-fraction-static must be a number from 0.01 to 0.99"),
        ("max_control_timeout", -1.0, "--max-control-timeout must be a number from 0"),
        ("flush_default_timeout", 3601.0, "--flush-default-timeout must be at most --max-control-timeout, 3600"),
        ("flush_default_mode", "later", "--flush-default-mode must be one of idle, now, drain"),
        ("engine_restarts", -1, "--engine-restarts must be an integer from 0"),
        ("kv_cache_memory_mb", 0, "--kv-cache-memory-mb must be an integer of at least 1"),
        ("model", "", "--model must not be empty"),
        ("api_key", "", "--api-key must not be empty"),
    ],
)
def test_a_wrong_value_is_refused_by_name_and_range(field: str, value: object, says: str) -> None:
    with pytest.raises(ValueError, match="^" + says.replace(".", r"\.").replace("(", r"\(")):
        ServerArgs(**{field: value})


def test_an_unknown_argument_is_refused() -> None:
    with pytest.raises(TypeError, match="page_sise"):
        ServerArgs(page_sise=16)


def test_arguments_survive_the_way_to_the_engine_process() -> None:
    args = ServerArgs(model="some/folder", page_size=32, api_key="secret", mem_fraction_static=0.5)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(args), type=ServerArgs) == args


def test_public_arguments_hide_keys_and_show_all_else() -> None:
    public = ServerArgs(api_key="user-secret", admin_api_key="admin-secret").public()
    assert "secret" not in repr(public)
    assert public["api_key"] == "***"
    assert public["page_size"] == 16
    assert set(public) == set(FLAGS)
    assert ServerArgs().public()["api_key"] is None, "no key must not look like a hidden one"


def test_device_defaults_fill_only_what_was_left_open() -> None:
    args = ServerArgs().for_device("cpu")
    assert (args.max_running_requests, args.chunked_prefill_size) == (64, 512)
    assert (args.kv_cache_memory_mb, args.mem_fraction_static) == (None, None), "the default depends on the model"
    assert args.max_step_tokens == 512 + 64
    chosen = ServerArgs(max_running_requests=2, chunked_prefill_size=7, max_total_tokens=100).for_device("cpu")
    assert (chosen.max_running_requests, chosen.chunked_prefill_size) == (2, 7)
    on_gpu = ServerArgs().for_device("cuda")
    assert (on_gpu.max_running_requests, on_gpu.max_step_tokens, on_gpu.mem_fraction_static) == (256, 8192, 0.9)
    assert on_gpu.kv_cache_memory_mb is None
    assert ServerArgs(max_total_tokens=100).for_device("cuda").mem_fraction_static is None
    assert ServerArgs(dp_size=2).for_device("cuda").mem_fraction_static == 0.45, "two engines beside each other"
    with pytest.raises(ValueError, match="tpu"):
        ServerArgs().for_device("tpu")


def test_speculation_goes_with_every_device_and_knows_sglangs_word() -> None:
    assert ServerArgs().speculation == "none"
    args = ServerArgs(speculative_algorithm="NGRAM", speculative_num_draft_tokens=5).for_device("cpu")
    assert (args.speculation, args.speculative_num_draft_tokens) == ("ngram", 5)
    assert ServerArgs(speculative_algorithm="tree").for_device("cuda").speculation == "tree"
    with pytest.raises(ValueError, match="--speculative-num-draft-tokens needs"):
        ServerArgs(speculative_num_draft_tokens=5)


def test_every_flag_has_help() -> None:
    assert all(spec.flag.help.endswith(".") and spec.flag.section for spec in FLAGS.values())


def test_several_engines_share_cores_and_memory() -> None:
    """Each with all cores, they would fight over them; each with the whole share, they would not fit."""
    args = ServerArgs(dp_size=2, mem_fraction_static=0.8).for_one_engine(4)
    assert args.threads == 4
    assert args.for_device("cpu").mem_fraction_static == args.for_device("cuda").mem_fraction_static == 0.4
    assert args.for_device("cuda").for_device("cuda").mem_fraction_static == 0.4, "once"
    assert ServerArgs(dp_size=2).for_device("cpu").mem_fraction_static is None
    assert ServerArgs(mem_fraction_static=0.8).for_device("cpu").mem_fraction_static == 0.8


def test_origins_and_hosts_are_lists() -> None:
    args = ServerArgs(allowed_origin="https://a.example, http://localhost:3000,*,null", allowed_host="a.example,::1")
    assert args.allowed_origins == ("https://a.example", "http://localhost:3000", "*", "null")
    assert args.allowed_hosts == ("a.example", "::1")
    assert ServerArgs().allowed_origins == ServerArgs().allowed_hosts == ()


@pytest.mark.parametrize("origin", ["a.example", "https://a.example/path", "https://", "https://a b", "a,b"])
def test_what_is_no_origin_is_refused(origin: str) -> None:
    with pytest.raises(ValueError, match="--allowed-origin must be"):
        ServerArgs(allowed_origin=origin)


@pytest.mark.parametrize("host", ["https://a.example", "a.example:80", "a/b"])
def test_what_is_no_host_name_is_refused(host: str) -> None:
    with pytest.raises(ValueError, match="--allowed-host must be"):
        ServerArgs(allowed_host=host)
