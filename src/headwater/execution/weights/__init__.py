"""Where new weights come from."""
