"""Simulators behind one seam, see rlrc.envs.environment."""

from importlib.util import find_spec

from rlrc.envs.gl import choose_backend
from rlrc.libraries import keep_local

keep_local()

# mujoco reads MUJOCO_GL when it is first imported, so this comes before every module of this package.
# Not every simulator needs it: LIBERO's is in another Python environment.
if find_spec("mujoco") is not None:
    choose_backend()
