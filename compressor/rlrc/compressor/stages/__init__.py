"""The stages of a compression, artifact -> artifact, one a file."""
