"""On the board: check it, set it up, copy artifacts to it, build engines."""
