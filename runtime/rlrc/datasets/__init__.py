"""Read and write LeRobotDataset v3.0 folders without lerobot: parquet files, pictures or videos, metadata."""

from rlrc.libraries import keep_local

keep_local()
