"""From an observation to a chunk of actions: preprocessing, engines, decode drivers, verification."""
