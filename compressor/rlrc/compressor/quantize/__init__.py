"""Weights to 4 and 8 bits: the grid, and the methods that choose integers on it."""
