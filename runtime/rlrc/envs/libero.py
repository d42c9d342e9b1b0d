"""``libero:SUITE/NUMBER``: a LIBERO task, simulated by ``libero_worker`` in the Python of $RLRC_LIBERO_PYTHON.

Conventions are those of the evaluations of OpenVLA, OpenVLA-OFT and openpi; see the worker.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rlrc.artifact import PolicySpec
from rlrc.envs import libero_worker
from rlrc.envs.environment import check_fits, read_mapping
from rlrc.envs.gl import working_backend
from rlrc.envs.libero_worker import pack, unpack_array
from rlrc.envs.subprocess_client import SubprocessClient
from rlrc.errors import UserError
from rlrc.strict import check_distinct

PYTHON = "RLRC_LIBERO_PYTHON"
INITIAL_STATES = 50  # of every task: its number of different episodes
START_S, RESET_S, STEP_S = 600.0, 600.0, 120.0  # timeouts in seconds, for a busy machine without a GPU
REMEDY = "name the policy's cameras in a mapping file (docs/simulators.md)"


@dataclass(frozen=True)
class LiberoMapping:
    """The mapping file, all of it optional.

    ``cameras``: from the policy's cameras to LIBERO's (default: the first two in order; an optional third is left out).
    ``gripper``: "openvla" for a policy whose gripper is 0 (close) to 1 (open), as in OpenVLA's data, rounded to the
    nearer end; "libero" for LIBERO's -1 (open) to 1 (close) (default: by family). ``size``: pixels of the pictures.
    """

    cameras: dict[str, Literal["agentview", "robot0_eye_in_hand"]] = field(default_factory=dict)
    gripper: Literal["openvla", "libero"] | None = None
    size: int = 256


@dataclass(frozen=True)
class LiberoTask:
    """A task, and what the policy takes of it; ``rules`` name all cameras."""

    suite: str
    number: int
    rules: LiberoMapping
    with_state: bool

    @property
    def name(self) -> str:
        return f"libero:{self.suite}/{self.number}"

    def observation(
        self, pictures: Mapping[str, NDArray[Any]], state: NDArray[Any], instruction: str
    ) -> dict[str, Any]:
        """The policy's observation, from ``pictures`` by LIBERO's names."""
        images = {f"image.{camera}": pictures[source] for camera, source in self.rules.cameras.items()}
        values = {"state": state} if self.with_state else {}  # OpenVLA takes none
        return images | values | {"instruction": instruction}


class LiberoEnvironment:
    """One task; the episode of a seed starts from initial state ``seed % 50``. Raises UserError if the worker fails."""

    def __init__(self, task: LiberoTask) -> None:
        self.task, self.name, self.over = task, task.name, False
        python = _find_python()
        # -I: search neither PYTHONPATH nor the worker's folder, whose modules would hide LIBERO's.
        command = [python, "-I", libero_worker.__file__, task.suite, str(task.number), "--size", str(task.rules.size)]
        self.simulator = SubprocessClient(command, _make_environment(python), f"the simulator of {self.name}")
        metadata = self.simulator.receive(START_S)
        if metadata.get("hello") != libero_worker.PROTOCOL:
            self.simulator.close()
            raise UserError(
                f"expected protocol {libero_worker.PROTOCOL} of {self.simulator.what}, found "
                f"{metadata.get('hello')!r}; install rlrc again"
            )
        self.hz, self.horizon = float(metadata["hz"]), int(metadata["horizon"])
        self.episodes = int(metadata["episodes"])
        self.instruction, self.versions = str(metadata["instruction"]), dict(metadata["versions"])

    def reset(self, *, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
        self.simulator.request(pack({"do": "reset", "episode": seed % self.episodes}), RESET_S)
        self.over = False
        return self.observe(), {}

    def advance(self, action: NDArray[np.float32]) -> bool:
        openvla = self.task.rules.gripper == "openvla"
        given = invert_gripper(action) if openvla else np.asarray(action, np.float64)
        self.over = bool(self.simulator.request(pack({"do": "step", "action": given}), STEP_S)["success"])
        return self.over

    def observe(self) -> dict[str, Any]:
        reply = self.simulator.request(pack({"do": "observe"}), STEP_S)
        pictures = {name: unpack_array(picture) for name, picture in reply["pictures"].items()}
        return self.task.observation(pictures, unpack_array(reply["state"]), self.instruction)

    def close(self) -> None:
        self.simulator.close()


def invert_gripper(action: NDArray[np.float32]) -> NDArray[np.float64]:
    """Map the last dimension from 0 (close) .. 1 (open) to 1 (close) or -1 (open), the nearer end.

    OpenVLA's ``normalize_gripper_action(binarize=True)`` and ``invert_gripper_action``.
    """
    inverted = np.array(action, np.float64)
    inverted[-1] = -np.sign(2 * inverted[-1] - 1)
    return inverted


def for_policy(task: str, spec: PolicySpec, mapping: Path | None) -> LiberoEnvironment:
    """Start the simulator of SUITE/NUMBER, such as libero_spatial/0; this takes seconds."""
    return LiberoEnvironment(_parse_task(task, spec, mapping))


def check(task: str, spec: PolicySpec, mapping: Path | None) -> None:
    """Raises UserError unless the policy fits LIBERO; only the simulator can check that the task exists."""
    _parse_task(task, spec, mapping)
    _find_python()


def _parse_task(text: str, spec: PolicySpec, mapping: Path | None) -> LiberoTask:
    suite, _, number = text.rpartition("/")
    if not suite or not number.isdecimal():
        raise UserError(
            f"expected libero:SUITE/NUMBER, found 'libero:{text}'; give libero:libero_spatial/0, for instance"
        )
    rules = read_mapping(LiberoMapping, mapping) if mapping else LiberoMapping()
    check_distinct(rules.cameras, "camera of LIBERO", "cameras of the policy", str(mapping))
    if not 1 <= rules.size <= 1024:
        raise UserError(f"expected size as 1 to 1024 pixels, found {rules.size}; correct {mapping}")
    task = LiberoTask(
        suite,
        int(number),
        LiberoMapping(_choose_cameras(spec, rules), _choose_gripper(spec, rules), rules.size),
        spec.state is not None,
    )
    black = np.zeros((rules.size, rules.size, 3), np.uint8)
    example = task.observation(dict.fromkeys(libero_worker.CAMERAS, black), np.zeros(libero_worker.STATE), "any")
    check_fits(task.name, example, len(libero_worker.IDLE), spec, REMEDY)
    return task


def _choose_cameras(spec: PolicySpec, rules: LiberoMapping) -> dict[str, Any]:
    return rules.cameras or dict(zip((camera.name for camera in spec.cameras), libero_worker.CAMERAS, strict=False))


def _choose_gripper(spec: PolicySpec, rules: LiberoMapping) -> Literal["openvla", "libero"]:
    """OpenVLA's data sets have a gripper of 0 to 1; openpi and lerobot keep LIBERO's."""
    return rules.gripper or ("openvla" if spec.family in ("openvla", "openvla-oft") else "libero")


def _find_python() -> str:
    python = os.environ.get(PYTHON)
    if python and shutil.which(python):
        return python
    raise UserError(
        f"expected {PYTHON} to name the Python of an environment that has LIBERO, found {python or 'it unset'}; "
        "run scripts/libero.sh, which makes one and prints the setting (docs/simulators.md)"
    )


def _make_environment(python: str) -> dict[str, str]:
    """The worker's environment variables; it renders with MUJOCO_GL if set, else with EGL or OSMesa."""
    chosen = os.environ.get("MUJOCO_GL") or working_backend(python)
    return os.environ | {"MUJOCO_GL": chosen, "LP_NUM_THREADS": os.environ.get("LP_NUM_THREADS", "0")}
