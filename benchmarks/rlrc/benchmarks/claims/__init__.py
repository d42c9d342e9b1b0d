"""Checks of the project's claims: memory, latency and success at one operating point."""
