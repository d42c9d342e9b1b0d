"""From an observation to a chunk of actions: preprocessing, engines, decoding, verification."""
