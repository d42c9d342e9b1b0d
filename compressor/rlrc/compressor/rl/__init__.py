"""Policies that act in the simulator: rollouts, PPO, DAgger, scripted experts."""
