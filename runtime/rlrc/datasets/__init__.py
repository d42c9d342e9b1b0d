"""LeRobotDataset v3.0 folders, read and written without lerobot: parquet, pictures or video, metadata."""
