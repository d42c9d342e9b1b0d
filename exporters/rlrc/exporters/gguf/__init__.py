"""TODO gguf."""
