"""Benchmarks of the control loop and the servers under load and faults, with a simulated arm."""
