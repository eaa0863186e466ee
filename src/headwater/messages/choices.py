"""Names of stores and policies, as flags, bodies and messages spell them. The command line reads this file alone."""

from typing import Literal

StoreKind = Literal["file", "redis", "memory"]  # storage/registry.py opens them
PrefetchPolicyName = Literal["best_effort", "wait_complete", "timeout"]
RestorePolicyName = Literal["auto", "always"]
WritePolicyName = Literal["write_through", "write_through_selective", "write_back"]
KvEventsFormat = Literal["map", "array"]
