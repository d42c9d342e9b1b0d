"""LeRobotDataset v3.0 folders, read and written without lerobot: parquet, pictures or video, metadata."""

from rlrc.libraries import keep_local

keep_local()
