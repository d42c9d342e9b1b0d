"""LeRobot's folders of pi0, pi0.5, SmolVLA and ACT, and their processor pipelines."""
