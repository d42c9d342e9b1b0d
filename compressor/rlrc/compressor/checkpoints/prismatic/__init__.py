"""TODO prismatic."""
