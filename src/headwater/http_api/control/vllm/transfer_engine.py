"""What vLLM's calls for weights leave to later calls."""

from dataclasses import dataclass


@dataclass(slots=True)
class TransferEngine:
    """One per app."""

    piece_bytes: int = 0  # of packed tensors; 0: tensors come one by one
    bracket_id: str | None = None  # opened by /start_weight_update
