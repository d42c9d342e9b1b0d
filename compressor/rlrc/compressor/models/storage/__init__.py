"""Tensors in files: read, written, and kept in scratch files."""
