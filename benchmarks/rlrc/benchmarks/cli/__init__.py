"""The commands that measure and report: one dataclass each, with field docstrings as help texts."""
