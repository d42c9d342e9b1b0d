"""What `rlrc run` drives: robots, simulators, recordings. Their interface is rlrc.robots.robot."""

from rlrc.libraries import keep_local

keep_local()
