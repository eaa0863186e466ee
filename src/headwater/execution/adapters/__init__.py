"""LoRA adapters for a served model: read and checked in a thread, then put in a slot of the runner's memory."""
