"""Control routes by vLLM's names, for trainers written for it; each is carried out as one of the server's own."""
