"""Measurements: latency, memory, energy, throughput, success."""
