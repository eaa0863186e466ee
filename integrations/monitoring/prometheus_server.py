"""A Prometheus of our own, with the configuration and the alarms of deploy/prometheus, that scrapes every second."""

import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from servers import free_port

DEPLOY = Path(__file__).parents[2] / "deploy" / "prometheus"
START_LIMIT_S = 60.0
FOR = "2s"  # how long an alarm's condition must hold, in place of minutes


class Prometheus:
    """Asks a running Prometheus. `started` gives one."""

    def __init__(self, url: str) -> None:
        self._http = httpx.Client(base_url=url, timeout=30, trust_env=False)

    def ask(self, query: str) -> list[dict[str, Any]]:
        """The series of an instant query, without those that are not a number. RuntimeError if it is no query."""
        return [series for series in self._get("query", query=query)["result"] if series["value"][1] != "NaN"]

    def alarms(self) -> list[dict[str, Any]]:
        """Name, query, health and state of each alarm."""
        return [rule for group in self._get("rules")["groups"] for rule in group["rules"]]

    def version(self) -> str:
        return self._get("status/buildinfo")["version"]

    def is_ready(self) -> bool:
        try:
            return self._http.get("/-/ready").status_code == 200
        except httpx.TransportError:
            return False

    def close(self) -> None:
        self._http.close()

    def _get(self, path: str, **parameters: str) -> dict[str, Any]:
        answer = self._http.get(f"/api/v1/{path}", params=parameters).json()
        if answer["status"] != "success":
            raise RuntimeError(f"{parameters}: {answer.get('error')}")
        return answer["data"]


@contextmanager
def started(server_url: str, folder: Path) -> Iterator[Prometheus]:
    """Scrapes `server_url`; its files lie in `folder`. FileNotFoundError if Prometheus is not installed."""
    _configure(server_url, folder)
    port = free_port()
    command = [
        "prometheus",
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=error",
    ]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    found = Prometheus(f"http://127.0.0.1:{port}")
    try:
        deadline_s = time.monotonic() + START_LIMIT_S
        while not found.is_ready():
            if process.poll() is not None or time.monotonic() > deadline_s:
                raise RuntimeError("Prometheus does not start; its last lines are above")
            time.sleep(0.2)
        yield found
    finally:
        found.close()
        process.terminate()
        process.wait(30)


def _configure(server_url: str, folder: Path) -> None:
    """The files of deploy/prometheus, but for the server's address and for everything that takes minutes."""
    config = (DEPLOY / "prometheus.yml").read_text()
    for setting, value in (
        (r"(scrape|evaluation)_interval: \w+", r"\1_interval: 1s"),
        (r'targets: \[".*"\]', f'targets: ["{server_url.removeprefix("http://")}"]'),
    ):
        config, count = re.subn(setting, value, config)
        assert count, f"deploy/prometheus/prometheus.yml has no {setting}"
    (folder / "prometheus.yml").write_text(config)
    shutil.copy(DEPLOY / "alerts.yml", folder)
    alarms = folder / "alerts.yml"
    alarms.write_text(re.sub(r"\bfor: \w+", f"for: {FOR}", alarms.read_text()))
