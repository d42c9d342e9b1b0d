"""The commands that measure and report. A dataclass each; the field docstrings are the help."""
