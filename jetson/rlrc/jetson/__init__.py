"""Plans, checks and installs on NVIDIA Jetson. Runs without torch."""

from rlrc.libraries import keep_local

keep_local()
