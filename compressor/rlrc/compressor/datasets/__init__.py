"""Data sets of demonstrations: LeRobotDataset v3.0 folders, read and written without lerobot. No torch here."""
