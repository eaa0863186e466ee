"""A Redis or Valkey server of our own for a test: private folder, unix socket, ended by its pid."""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

START_S = 10.0


def find_binary() -> str:
    """Path of a server. Without one: skip, but fail where CI must have it."""
    for name in ("redis-server", "valkey-server"):
        path = shutil.which(name)
        if path is not None:
            return path
    if os.environ.get("CI") == "true":
        pytest.fail("CI needs redis-server or valkey-server on the PATH")
    pytest.skip("no redis-server or valkey-server on the PATH")


class RedisServer:
    """Started by `start`; keeps its folder across `kill` and `start`."""

    def __init__(self, *options: str, preload: Path | None = None) -> None:
        """`preload` is a library whose functions replace the C library's."""
        self._binary = find_binary()
        self._options = options
        self._environment = os.environ | ({"LD_PRELOAD": str(preload)} if preload else {})
        self._folder = Path(tempfile.mkdtemp(prefix="hw-redis-"))  # short: a socket's path is limited
        self._socket = self._folder / "s"
        self._process: subprocess.Popen | None = None

    @property
    def url(self) -> str:
        return f"unix://{self._socket}"

    def client(self) -> redis.Redis:
        return redis.Redis(unix_socket_path=str(self._socket), retry=Retry(NoBackoff(), 0))

    def start(self) -> None:
        base = ["--port", "0", "--unixsocket", str(self._socket), "--dir", str(self._folder)]
        command = [self._binary, *base, "--save", "", "--daemonize", "no", *self._options]
        quiet = subprocess.DEVNULL
        self._process = subprocess.Popen(command, stdout=quiet, stderr=quiet, env=self._environment)
        give_up_s = time.monotonic() + START_S
        while not self._answers():
            assert self._process.poll() is None, f"{self._binary} ended at once"
            assert time.monotonic() < give_up_s, f"{self._binary} did not start"
            time.sleep(0.02)

    def kill(self) -> None:
        """As a crash: SIGKILL."""
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        self._process = None

    def stop_answering(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def answer_again(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        if self._process is not None:
            self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _answers(self) -> bool:
        try:
            with self.client() as client:
                client.ping()
                return True
        except redis.exceptions.AuthenticationError:
            return True
        except redis.exceptions.RedisError:
            return False
