"""Export for TensorRT: standard operators, optimization profiles, 8-bit scales."""
