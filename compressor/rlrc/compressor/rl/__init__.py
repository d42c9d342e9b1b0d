"""TODO rl."""
