"""File descriptors: raise their limit, and reserve some of them beside client connections."""

import contextlib
import resource

WANTED = 65_536
RESERVED = 512  # for engines' sockets, files, and connections on their way out
MOST_CONNECTIONS = 16_384  # by default


def raise_descriptor_limit() -> int:
    """Raise the limit on open files to the system's maximum, for this process and its children; return the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = WANTED if hard == resource.RLIM_INFINITY else min(hard, WANTED)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        # some systems permit less than their reported maximum
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return WANTED if soft == resource.RLIM_INFINITY else soft


def default_max_connections(num_descriptors: int) -> int:
    """The number of connections that leaves enough descriptors for everything else."""
    return max(16, min(MOST_CONNECTIONS, max(num_descriptors - RESERVED, num_descriptors // 2)))
