"""The policies in torch: families, decode drivers, and the modules they are built from."""
