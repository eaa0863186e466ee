"""A port for a server that starts later must be free when it has started."""

import socket

import pytest

from headwater.server.serve import open_port
from processes import held_port, number_of


def test_a_server_listens_on_a_held_port_and_nobody_else_is_given_it() -> None:
    with held_port() as holder:
        number = number_of(holder)
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", number))
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", number))
        with open_port("127.0.0.1", number) as listener, socket.create_connection(("127.0.0.1", number)):
            listener.accept()[0].close()
        with pytest.raises(ConnectionRefusedError):  # and it stays held for a server that starts again
            socket.create_connection(("127.0.0.1", number))
