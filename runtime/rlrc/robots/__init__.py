"""What `rlrc run` drives: robots, simulators in their place, recordings. The seam is rlrc.robots.robot."""

from rlrc.libraries import keep_local

keep_local()
