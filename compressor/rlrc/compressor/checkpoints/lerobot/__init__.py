"""The folders that LeRobot saves: pi0, pi0.5, SmolVLA, ACT, and their processor pipelines."""
