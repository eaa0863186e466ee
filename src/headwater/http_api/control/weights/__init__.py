"""Weights that a trainer sends: buckets of tensors, and the brackets that hold them together."""
