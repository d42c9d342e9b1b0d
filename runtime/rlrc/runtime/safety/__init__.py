"""What stands between policy and robot: profiles of limits, the guard, and its arithmetic."""
