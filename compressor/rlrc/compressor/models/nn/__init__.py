"""Native modules with explicit per-layer geometry, which express every family."""
