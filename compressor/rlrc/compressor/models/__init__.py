"""The policies in torch: families, decode drivers, and modules of explicit geometry."""
