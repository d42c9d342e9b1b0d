"""What `rlrc run` drives: robots, simulators in their place, recordings. The seam is rlrc.robots.robot."""
