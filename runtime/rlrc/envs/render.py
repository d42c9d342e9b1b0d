"""Fast pictures of a Meta-World scene, from a render-only copy of the model with decimated meshes.

The stock renderer gives 2.4 frames a second on a CPU at any size: its off-screen buffer is 640 x 480 with
multisampling, shadows are 4096 wide, and the arm has 68,000 triangles. A buffer of the picture's size, no shadows and
8,000 triangles give 200 to 400.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import metaworld
import mujoco
import numpy as np
import numpy.typing as npt

from rlrc.libraries import cache_folder

STOCK_ASSETS = Path(metaworld.__file__).parent / "assets"
CAMERA = "corner4"
_FACES, _FACES_BASE = 800, 400  # triangles kept per mesh, and per mesh of the arm's stationary base
_SMALL_FILE = 50_000  # bytes; smaller meshes are coarse already


@cache
def make_light_assets() -> Path:
    """The folder of Meta-World's assets with decimated meshes; the first call takes ten seconds to make it."""
    folder = cache_folder() / f"metaworld-{version('metaworld')}-{_FACES}"
    if folder.exists():
        return folder
    import fast_simplification
    import trimesh

    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    shutil.copytree(STOCK_ASSETS, partial, dirs_exist_ok=True)
    for file in (partial / "objects" / "meshes").rglob("*.stl"):
        faces = _FACES_BASE if "xyz_base" in str(file) else _FACES
        mesh = trimesh.load_mesh(file)
        if file.stat().st_size < _SMALL_FILE or len(mesh.faces) <= faces:
            continue
        vertices = np.asarray(mesh.vertices, np.float32)
        trimesh.Trimesh(*fast_simplification.simplify(vertices, np.asarray(mesh.faces), target_count=faces)).export(
            file
        )
    try:
        partial.rename(folder)
    except OSError:  # another process was faster
        shutil.rmtree(partial)
    return folder


class SceneRenderer:
    """Renders pictures of one scene file, for all simulations of that scene in this process."""

    def __init__(self, scene: str, size: int) -> None:
        self.model = mujoco.MjModel.from_xml_path(str(make_light_assets() / Path(scene).relative_to(STOCK_ASSETS)))
        self.data = mujoco.MjData(self.model)
        self.model.vis.quality.offsamples = 0
        self.model.vis.quality.shadowsize = 0
        self.model.vis.global_.offwidth = self.model.vis.global_.offheight = size
        self.renderer = mujoco.Renderer(self.model, size, size)
        for flag in (
            mujoco.mjtRndFlag.mjRND_SHADOW,
            mujoco.mjtRndFlag.mjRND_REFLECTION,
            mujoco.mjtRndFlag.mjRND_SKYBOX,
        ):
            self.renderer.scene.flags[flag] = 0
        self.options = mujoco.MjvOption()
        # Hide sites, marks of the simulator: real cameras do not see them, and some mark the goal.
        self.options.sitegroup[:] = 0

    def __call__(self, model: Any, data: Any) -> npt.NDArray[np.uint8]:
        """The camera's picture of the physics state ``(model, data)``: uint8 (size, size, 3)."""
        self.model.body_pos[:], self.model.body_quat[:] = model.body_pos, model.body_quat
        self.data.qpos[:] = data.qpos
        self.data.mocap_pos[:], self.data.mocap_quat[:] = data.mocap_pos, data.mocap_quat
        mujoco.mj_kinematics(self.model, self.data)
        mujoco.mj_comPos(self.model, self.data)
        mujoco.mj_camlight(self.model, self.data)
        self.renderer.update_scene(self.data, camera=CAMERA, scene_option=self.options)
        return np.array(self.renderer.render(), np.uint8)


_renderers: dict[tuple[str, int], SceneRenderer] = {}


def get_renderer(scene: str, size: int) -> SceneRenderer:
    """The renderer of a scene file in this process, made at the first call; ``close_renderers`` closes all."""
    key = (scene, size)
    if key not in _renderers:
        _renderers[key] = SceneRenderer(scene, size)
        # Registered after the first context, to run before mujoco's exit handler terminates EGL.
        atexit.unregister(close_renderers)
        atexit.register(close_renderers)
    return _renderers[key]


def close_renderers() -> None:
    """Free the GL contexts, which would otherwise print harmless tracebacks when Python exits."""
    while _renderers:
        _renderers.popitem()[1].renderer.close()
