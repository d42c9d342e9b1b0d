"""Engines that run an artifact's graphs, one module each; imported when a policy needs it."""
