"""The modules of all families, with an explicit geometry for every layer."""
