"""Planning: how a fleet would serve a workload, by the real scheduler and cache in virtual time."""
