"""Structured pruning: what is scored, what is cut, what it costs."""
