"""What can go wrong with rank processes, by itself: the processes of a server name these errors and have no ranks."""


class RankLost(RuntimeError):
    """A rank process has ended or hangs. The engine cannot go on, and is to be started again with all its ranks."""


class RankRefused(ValueError):
    """A rank process cannot start, by a mistake of the user."""
