"""TODO lerobot."""
