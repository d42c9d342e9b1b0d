"""Plans, checks and installs on NVIDIA Jetson. Runs without torch."""
