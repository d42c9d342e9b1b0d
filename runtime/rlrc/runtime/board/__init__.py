"""Sensors of the board: power, temperatures, throttling, memory, read beside the control loop."""
