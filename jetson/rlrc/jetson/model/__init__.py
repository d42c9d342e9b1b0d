"""Predictions without a board: devices, operations, roofline, memory, the plan."""
