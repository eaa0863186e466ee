"""Ways of new weights into the server: each writes whole buckets of tensors into a staging folder."""
