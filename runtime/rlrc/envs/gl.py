"""Choose how MuJoCo renders without a screen: EGL, else OSMesa. Called before mujoco is imported."""

from __future__ import annotations

import os
import subprocess
import sys

from rlrc.errors import UserError

_PROBE = "import mujoco; context = mujoco.GLContext(16, 16); context.make_current(); context.free()"


def _works(backend: str, python: str) -> bool:
    environment = os.environ | {"MUJOCO_GL": backend, "PYTHONWARNINGS": "ignore"}
    return subprocess.run([python, "-c", _PROBE], env=environment, capture_output=True, check=False).returncode == 0


def choose_backend() -> str:
    """Set MUJOCO_GL for this process and its child processes, unless the user has set it; returns it.

    Raises UserError if neither EGL nor OSMesa can make a context, or if mujoco was imported without a choice.
    """
    # Mesa's software rasterizer starts a thread per core; several simulators at once would compete for the cores.
    os.environ.setdefault("LP_NUM_THREADS", "0")
    if chosen := os.environ.get("MUJOCO_GL"):
        return chosen
    if "mujoco" in sys.modules:  # it has chosen GLFW, which needs a screen, and cannot change that
        raise UserError(
            "expected rlrc.envs to be imported before mujoco, found mujoco imported without MUJOCO_GL; "
            "import rlrc.envs first, or set MUJOCO_GL to egl or osmesa before Python starts"
        )
    os.environ["MUJOCO_GL"] = backend = working_backend(sys.executable)
    return backend


def working_backend(python: str) -> str:
    """The backend that the mujoco of this interpreter can render with. Raises UserError if there is none."""
    for backend in ("egl", "osmesa"):
        if _works(backend, python):
            return backend
    raise UserError(
        "expected EGL or OSMesa for rendering without a screen, found neither; "
        "install libegl1 libgl1-mesa-dri libgles2 (EGL) or libosmesa6 (OSMesa), or set MUJOCO_GL"
    )
