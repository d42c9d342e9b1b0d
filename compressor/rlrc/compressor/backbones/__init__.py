"""One module per family of policies."""
