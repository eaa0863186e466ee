"""Flags of the cache events."""

import pytest

from headwater.launch.config import ServerArgs


@pytest.mark.parametrize("endpoint", ["tcp://127.0.0.1:5557", "tcp://[::1]:5557", "tcp://*:5557", "ipc:///tmp/events"])
def test_addresses_that_zmq_can_bind(endpoint: str) -> None:
    assert ServerArgs(kv_events_endpoint=endpoint).kv_events_endpoint == endpoint


@pytest.mark.parametrize("endpoint", ["127.0.0.1:5557", "http://a:1", "tcp://a", "ipc://relative", ""])
def test_another_address_is_refused_with_the_flag(endpoint: str) -> None:
    """Before the model is loaded, not minutes later."""
    with pytest.raises(ValueError, match="--kv-events-endpoint must be tcp://"):
        ServerArgs(kv_events_endpoint=endpoint)


@pytest.mark.parametrize(
    ("flag", "value"), [("replay_endpoint", "tcp://127.0.0.1:5558"), ("format", "array"), ("topic", "kv@here@model")]
)
def test_settings_of_events_that_are_not_published_are_refused(flag: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"--kv-events-{flag.replace('_', '-')} needs --kv-events-endpoint"):
        ServerArgs(**{f"kv_events_{flag}": value})  # type: ignore[arg-type]
