"""TODO tensorrt."""
