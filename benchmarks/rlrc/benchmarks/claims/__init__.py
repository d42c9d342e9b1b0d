"""The project's claims, checked: memory, latency and success at one operating point."""
