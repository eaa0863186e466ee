"""The API process's side of the wire to the engines."""
