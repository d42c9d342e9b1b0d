"""The commands of the compressor. A dataclass each; the field docstrings are the help."""
