"""When device pages are copied to the host."""

from enum import Enum


class WritePolicy(Enum):
    """`write_through`: as soon as they are shared. `write_through_selective`: once they were hit again.

    `write_back`: before they would be evicted. A page that is evicted before its copy began is lost to the
    host, never to correctness.
    """

    WRITE_THROUGH = "write_through"
    WRITE_THROUGH_SELECTIVE = "write_through_selective"
    WRITE_BACK = "write_back"
