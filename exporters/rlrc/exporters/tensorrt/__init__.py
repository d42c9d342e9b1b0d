"""TensorRT: standard operators, optimisation profiles, 8-bit scales."""
