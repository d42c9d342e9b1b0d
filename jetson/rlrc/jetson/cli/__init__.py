"""The commands ``rlrc jetson ...``. A dataclass each; the field docstrings are the help."""
