"""The commands of the compressor, one dataclass each; the docstrings of the fields are the help texts."""
