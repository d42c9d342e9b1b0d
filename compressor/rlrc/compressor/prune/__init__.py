"""Structured pruning: scores, allocation, cuts, and a cost model."""
