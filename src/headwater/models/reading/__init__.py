"""Reading a model's tensors: ahead of their use, with progress, and the hash of their files."""
