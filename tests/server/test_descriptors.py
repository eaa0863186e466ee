"""Connections never take the last descriptor, whatever the system's limit is."""

import resource
import subprocess
import sys

import pytest

from headwater.server.descriptors import MOST_CONNECTIONS, default_max_connections

SCRIPT = """
import resource
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
from headwater.server.descriptors import raise_descriptor_limit
print(raise_descriptor_limit(), resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""


@pytest.mark.parametrize(
    ("num_descriptors", "expected"),
    [(64, 32), (1024, 512), (4096, 3584), (20_000, MOST_CONNECTIONS), (1 << 20, MOST_CONNECTIONS)],
)
def test_connections_leave_descriptors_for_everything_else(num_descriptors: int, expected: int) -> None:
    assert default_max_connections(num_descriptors) == expected


def test_the_soft_limit_is_raised_to_what_the_system_permits() -> None:
    """1,024, a usual soft limit, is less than the streams of one training run."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if 0 <= hard <= 200:
        pytest.skip("the hard limit is as low as the test's soft limit")
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, timeout=60)
    told, in_force = map(int, done.stdout.split())
    assert told == in_force > 200
