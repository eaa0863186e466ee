"""A fleet in virtual time: the real front, and stand-ins for its replicas."""
