"""TODO safety."""
