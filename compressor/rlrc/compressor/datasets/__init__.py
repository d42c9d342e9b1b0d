"""Data sets for the compressor: what a LeRobotDataset (rlrc.datasets) holds, and whether it fits a policy. No torch."""
