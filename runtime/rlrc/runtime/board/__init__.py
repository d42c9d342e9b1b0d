"""Sensors of the board: power, temperatures, throttling, memory, read in a separate process."""
