"""Simulators behind Gymnasium environments."""

from rlrc.envs.gl import choose_backend

# mujoco reads MUJOCO_GL when it is first imported, so this comes before every module of this package.
choose_backend()
