"""Wire formats and what every network port has in common: parsers, limits, tokens, logs, metrics."""
