"""Wire formats, and what all network ports share: parsers, limits, tokens, logs, metrics."""
