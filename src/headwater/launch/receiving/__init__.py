"""Processes that receive tensors from a trainer with PyTorch. They end with the server, and may be killed any time."""
