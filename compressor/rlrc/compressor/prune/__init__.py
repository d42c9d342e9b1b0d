"""TODO prune."""
