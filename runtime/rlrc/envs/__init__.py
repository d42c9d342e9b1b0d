"""Simulators behind one interface, rlrc.envs.environment."""

from importlib.util import find_spec

from rlrc.envs.gl import choose_backend
from rlrc.libraries import keep_local

keep_local()

# mujoco reads MUJOCO_GL at its first import, so the choice precedes all modules of this package. mujoco may be missing:
# LIBERO's is in another Python environment.
if find_spec("mujoco") is not None:
    choose_backend()
