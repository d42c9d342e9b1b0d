"""Latency, memory and success of policies on this machine, the claims made about them, and the report. No torch."""
