"""Latency, memory and success of policies on this machine, the claims made about them, and the report. No torch."""

from rlrc.libraries import keep_local

keep_local()
