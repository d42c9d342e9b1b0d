"""``libero:SUITE/NUMBER``: a LIBERO task, simulated by ``libero_worker`` in the Python of $RLRC_LIBERO_PYTHON.

Conventions are those of OpenVLA's, OpenVLA-OFT's and openpi's own evaluations; see the worker for what it does.
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
from rlrc.envs.libero_worker import pack, unpacked_array
from rlrc.envs.peer import Peer
from rlrc.errors import UserError
from rlrc.strict import check_distinct

PYTHON = "RLRC_LIBERO_PYTHON"
INITIAL_STATES = 50  # of every task: so many different episodes there are
START_S, RESET_S, STEP_S = 600.0, 600.0, 120.0  # seconds of patience, on a busy machine without a GPU
REMEDY = "name the policy's cameras in a mapping file (docs/simulators.md)"


@dataclass(frozen=True)
class LiberoMapping:
    """The mapping file, all of it optional.

    ``cameras``: the policy's camera -> LIBERO's (default: the first two in their order, an optional third is left
    out). ``gripper``: "openvla" where the policy gives 0 (close) to 1 (open), as OpenVLA's data does, and the nearer
    end is taken; "libero" for LIBERO's own -1 (open) to 1 (close) (default: by family). ``size``: pixels of the
    pictures.
    """

    cameras: dict[str, Literal["agentview", "robot0_eye_in_hand"]] = field(default_factory=dict)
    gripper: Literal["openvla", "libero"] | None = None
    size: int = 256


@dataclass(frozen=True)
class LiberoTask:
    """What is opened, and what the policy takes of it: ``cameras`` as in the mapping, all of them named."""

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
        """As the policy takes it, of ``pictures`` by LIBERO's names."""
        seen = {f"image.{ours}": pictures[theirs] for ours, theirs in self.rules.cameras.items()}
        told = {"state": state} if self.with_state else {}  # OpenVLA takes none
        return seen | told | {"instruction": instruction}


class LiberoEnvironment:
    """One task; a seed's episode starts from initial state ``seed % 50``. Raises UserError for what the worker says."""

    def __init__(self, task: LiberoTask) -> None:
        self.task, self.name, self.over = task, task.name, False
        python = _python()
        # Isolated: neither our PYTHONPATH nor the worker's folder, whose modules would hide LIBERO's, are searched.
        worker = [python, "-I", libero_worker.__file__, task.suite, str(task.number), "--size", str(task.rules.size)]
        self.peer = Peer(worker, _environment(python), f"the simulator of {self.name}")
        hello = self.peer.receive(START_S)
        if hello.get("hello") != libero_worker.PROTOCOL:
            self.peer.close()
            raise UserError(
                f"expected protocol {libero_worker.PROTOCOL} of {self.peer.what}, found {hello.get('hello')!r}; "
                "install rlrc again"
            )
        self.hz, self.horizon, self.episodes = float(hello["hz"]), int(hello["horizon"]), int(hello["episodes"])
        self.instruction, self.versions = str(hello["instruction"]), dict(hello["versions"])

    def reset(self, *, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
        self.peer.ask(pack({"do": "reset", "episode": seed % self.episodes}), RESET_S)
        self.over = False
        return self.observe(), {}

    def advance(self, action: NDArray[np.float32]) -> bool:
        openvla = self.task.rules.gripper == "openvla"
        given = inverted_gripper(action) if openvla else np.asarray(action, np.float64)
        self.over = bool(self.peer.ask(pack({"do": "step", "action": given}), STEP_S)["success"])
        return self.over

    def observe(self) -> dict[str, Any]:
        seen = self.peer.ask(pack({"do": "observe"}), STEP_S)
        pictures = {name: unpacked_array(picture) for name, picture in seen["pictures"].items()}
        return self.task.observation(pictures, unpacked_array(seen["state"]), self.instruction)

    def close(self) -> None:
        self.peer.close()


def inverted_gripper(action: NDArray[np.float32]) -> NDArray[np.float64]:
    """The last dimension from 0 (close) .. 1 (open) to 1 (close) or -1 (open), whichever end is nearer.

    OpenVLA's ``normalize_gripper_action(binarize=True)`` and ``invert_gripper_action``.
    """
    given = np.array(action, np.float64)
    given[-1] = -np.sign(2 * given[-1] - 1)
    return given


def for_policy(task: str, spec: PolicySpec, mapping: Path | None) -> LiberoEnvironment:
    """``task`` is SUITE/NUMBER, such as libero_spatial/0. Starts the simulator, which takes seconds."""
    return LiberoEnvironment(_task(task, spec, mapping))


def check(task: str, spec: PolicySpec, mapping: Path | None) -> None:
    """Raises UserError unless the policy takes what LIBERO gives; whether the task is there its simulator tells."""
    _task(task, spec, mapping)
    _python()


def _task(text: str, spec: PolicySpec, mapping: Path | None) -> LiberoTask:
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
        LiberoMapping(_cameras(spec, rules), _gripper(spec, rules), rules.size),
        spec.state is not None,
    )
    black = np.zeros((rules.size, rules.size, 3), np.uint8)
    example = task.observation(dict.fromkeys(libero_worker.CAMERAS, black), np.zeros(libero_worker.STATE), "any")
    check_fits(task.name, example, len(libero_worker.IDLE), spec, REMEDY)
    return task


def _cameras(spec: PolicySpec, rules: LiberoMapping) -> dict[str, Any]:
    return rules.cameras or dict(zip((camera.name for camera in spec.cameras), libero_worker.CAMERAS, strict=False))


def _gripper(spec: PolicySpec, rules: LiberoMapping) -> Literal["openvla", "libero"]:
    """OpenVLA's data sets have the gripper as 0 to 1; openpi and lerobot leave it as LIBERO has it."""
    return rules.gripper or ("openvla" if spec.family in ("openvla", "openvla-oft") else "libero")


def _python() -> str:
    python = os.environ.get(PYTHON)
    if python and shutil.which(python):
        return python
    raise UserError(
        f"expected {PYTHON} to name the Python of an environment that has LIBERO, found {python or 'it unset'}; "
        "run scripts/libero.sh, which makes one and says what to set (docs/simulators.md)"
    )


def _environment(python: str) -> dict[str, str]:
    """The worker's environment variables: where nobody has chosen how it renders, EGL, else OSMesa."""
    chosen = os.environ.get("MUJOCO_GL") or working_backend(python)
    return os.environ | {"MUJOCO_GL": chosen, "LP_NUM_THREADS": os.environ.get("LP_NUM_THREADS", "0")}
