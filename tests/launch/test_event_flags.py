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


def test_a_replay_without_events_is_refused() -> None:
    with pytest.raises(ValueError, match="needs --kv-events-endpoint"):
        ServerArgs(kv_events_replay_endpoint="tcp://127.0.0.1:5558")
