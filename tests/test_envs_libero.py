"""``libero:SUITE/NUMBER``: the worker and its parent.

The worker runs in a Python of its own whose LIBERO is a stand-in of a few lines, so that every number can be followed;
the last test plays the real one where $RLRC_LIBERO_PYTHON says that it is installed.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlrc.artifact import ActionSpec, CameraSpec, NormStats, PolicySpec, StateSpec
from rlrc.envs import libero, libero_worker
from rlrc.envs.environment import open_environment
from rlrc.errors import UserError
from rlrc.runtime.cli import main

STAND_IN = '''
import json
import sys
from types import SimpleNamespace

import mujoco
import numpy as np

print("what LIBERO prints must not get into the answers")
assert sys.stdin.read() == ""


class Suite:
    n_tasks = 2

    def get_task(self, i):
        return SimpleNamespace(name=f"task_{i}", language="open the drawer")

    def get_task_init_states(self, i):
        return [np.array([state, 0.0]) for state in range(50)]

    def get_task_bddl_file_path(self, i):
        return f"{i}.bddl"


class OffScreenRenderEnv:
    """Counts steps in the position of a joint; succeeds when the gripper closes.

    As robosuite does, it samples its sensors in the middle of a step. A picture tells initial state, steps and camera.
    """

    language_instruction = "lift the drawer"
    XML = "<mujoco><worldbody><body><joint name='steps' type='slide'/><geom size='1'/></body></worldbody></mujoco>"

    def __init__(self, bddl_file_name, use_camera_obs, control_freq):
        assert (use_camera_obs, control_freq) == (False, 20)
        model = mujoco.MjModel.from_xml_string(self.XML)
        self.data = mujoco.MjData(model)
        data = SimpleNamespace(_data=self.data)
        context = SimpleNamespace(data=data)
        self.sim = SimpleNamespace(render=self.render, data=data, _render_context_offscreen=context)
        self.env, self._observables = self, {"robot0_eef_pos": SimpleNamespace()}

    def seed(self, seed):
        assert seed == 0

    def reset(self):
        self.data.qpos[0] = 0
        self._observables["robot0_eef_pos"]._sensor = lambda cache: np.array([self.at[0], self.data.qpos[0], 0.5])

    def modify_observable(self, name, attribute, modifier):
        assert (name, attribute) == ("robot0_eef_pos", "sensor")
        self._observables[name]._sensor = modifier

    def set_init_state(self, state):
        self.at, self.last = state, np.zeros(7)
        return self.observation()

    def step(self, action):
        assert action.shape == (7,)
        if action[0] == 77:
            raise RuntimeError("the simulation is unstable")
        self.last = action
        assert self.data.qpos[0] >= 10 or action.tolist() == [0, 0, 0, 0, 0, 0, -1]
        self.data.qpos[0] += 0.75
        sampled = self.observation()
        self.data.qpos[0] += 0.25
        return sampled, 0.0, bool(action[6] == 1), {}

    def observation(self):
        half = np.sqrt(0.5)
        return {
            "robot0_eef_pos": self._observables["robot0_eef_pos"]._sensor({}),
            "robot0_eef_quat": np.array([0.0, half, 0.0, half]),
            "robot0_gripper_qpos": self.last[5:],
        }

    def render(self, camera_name, width, height):
        picture = np.zeros((height, width, 3), np.uint8)
        seen = self.sim._render_context_offscreen.data._data.qpos[0]
        picture[0, 0] = [self.at[0], seen * 4 % 256, 9 if camera_name == "agentview" else 5]
        return picture


benchmark = SimpleNamespace(get_benchmark_dict=lambda: {"libero_goal": Suite, "libero_goal_lan": Suite})
'''


def interpreter(folder: Path, code: str) -> str:
    """A Python that runs ``code`` first, in which the script's path and arguments are ``sys.argv[1:]``."""
    path = folder / "python"
    (folder / "first.py").write_text(code)
    path.write_text(f'#!/bin/sh\nshift\nexec "{sys.executable}" "{folder}/first.py" "$@"\n')
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "libero/libero/envs").mkdir(parents=True)
    (tmp_path / "libero/libero/__init__.py").write_text(STAND_IN)
    (tmp_path / "libero/libero/envs/__init__.py").write_text("from libero.libero import OffScreenRenderEnv\n")
    run = "import runpy, sys\nsys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')\n"
    monkeypatch.setenv("RLRC_LIBERO_PYTHON", interpreter(tmp_path, run))


@pytest.fixture
def spec(tiny_manifest: Any) -> PolicySpec:
    """Two cameras, LIBERO's eight numbers and words in; seven numbers out."""
    camera = CameraSpec("image0", 32, 32, "bicubic", (0.5,) * 3, (0.25,) * 3, "HWC")
    norm = NormStats((0.0,) * 8, (1.0,) * 8)
    action = ActionSpec(
        3, tuple("xyzrpyg"), ("delta",) * 6 + ("gripper",), ("m",) * 7, NormStats((0.0,) * 7, (1.0,) * 7), 32
    )
    return replace(
        tiny_manifest.policy,
        cameras=(camera, replace(camera, name="image1")),
        state=StateSpec(tuple("abcdefgh"), ("m",) * 8, norm),
        action=action,
    )


@pytest.fixture
def opened(stand_in: None, spec: PolicySpec) -> Iterator[libero.LiberoEnvironment]:
    env: Any = open_environment("libero:libero_goal/1", spec)
    yield env
    env.close()


def test_observations_and_actions_by_hand(opened: libero.LiberoEnvironment) -> None:
    assert (opened.name, opened.hz, opened.horizon, opened.episodes) == ("libero:libero_goal/1", 20, 300, 50)
    first, _ = opened.reset(seed=3_000_007)
    assert sorted(first) == ["image.image0", "image.image1", "instruction", "state"]
    assert first["instruction"] == "open the drawer"
    # Initial state 7, ten steps of settling, sampled a quarter of a step before the end; pictures count quarters. The
    # corner where a picture begins has been turned to its end.
    assert first["image.image0"][-1, -1].tolist() == [7, 39, 9]
    assert first["image.image1"][-1, -1].tolist() == [7, 39, 5]
    assert np.count_nonzero(first["image.image0"]) == 3
    assert first["image.image0"].shape == (256, 256, 3)
    # A quarter turn about y, and the fingers where the last action says.
    np.testing.assert_allclose(first["state"], [7, 9.75, 0.5, 0, math.pi / 2, 0, 0, -1], rtol=1e-6)

    assert not opened.advance(np.array([0, 0, 0, 0, 0, 0.25, 0.75], np.float32))
    np.testing.assert_allclose(opened.observe()["state"][[1, 6, 7]], [10.75, 0.25, 0.75])
    assert not opened.over
    assert opened.advance(np.array([0, 0, 0, 0, 0, 0, 1], np.float32))
    assert opened.over
    opened.reset(seed=3_000_051)
    assert not opened.over
    assert opened.observe()["state"][:2].tolist() == [1, 9.75]


@pytest.mark.parametrize(("family", "sent"), [("openvla", -1.0), ("openvla-oft", -1.0), ("pi0", 0.75)])
def test_the_gripper_follows_the_family(stand_in: None, spec: PolicySpec, family: str, sent: float) -> None:
    """0.75 of OpenVLA's 0 (close) to 1 (open) is open, which is -1 for LIBERO."""
    env = open_environment("libero:libero_goal/0", replace(spec, family=family))
    env.reset(seed=0)
    env.advance(np.array([0, 0, 0, 0, 0, 0, 0.75], np.float32))
    assert env.observe()["state"][7] == sent
    env.close()


def test_inverted_gripper() -> None:
    for given, sent in ((0.0, 1.0), (0.4, 1.0), (0.6, -1.0), (1.0, -1.0)):
        action = np.full(7, given, np.float32)
        np.testing.assert_allclose(libero.invert_gripper(action), [*[given] * 6, sent], rtol=1e-6)
        assert action[-1] == np.float32(given)


def test_axis_angle() -> None:
    half = math.sqrt(0.5)
    for quaternion, expected in (
        ((0, 0, 0, 1), (0, 0, 0)),
        ((half, 0, 0, half), (math.pi / 2, 0, 0)),
        ((0, 0, 1, 0), (0, 0, math.pi)),
        ((0, 0, half, -half), (0, 0, 3 * math.pi / 2)),  # not the short way round: as robosuite
    ):
        np.testing.assert_allclose(libero_worker.axis_angle(np.array(quaternion)), expected, atol=1e-7)


def test_horizons_and_words_of_perturbed_suites(stand_in: None, spec: PolicySpec) -> None:
    assert [libero_worker.horizon(suite) for suite in ("libero_spatial", "libero_10_swap", "libero_90")] == [
        220,
        520,
        400,
    ]
    env = open_environment("libero:libero_goal_lan/0", spec)
    assert env.horizon == 300
    assert env.reset(seed=0)[0]["instruction"] == "lift the drawer"
    env.close()


def test_a_mapping_file_names_cameras_gripper_and_size(stand_in: None, spec: PolicySpec, tmp_path: Path) -> None:
    mapping = tmp_path / "libero.toml"
    mapping.write_text(
        'size = 64\ngripper = "openvla"\n[cameras]\nimage1 = "agentview"\nimage0 = "robot0_eye_in_hand"\n'
    )
    env = open_environment("libero:libero_goal/0", spec, mapping)
    first, _ = env.reset(seed=0)
    assert first["image.image1"].shape == (64, 64, 3)
    assert (first["image.image1"][-1, -1, 2], first["image.image0"][-1, -1, 2]) == (9, 5)
    assert env.advance(np.zeros(7, np.float32))  # 0 is close: 1
    env.close()


@pytest.mark.parametrize(
    ("name", "change", "mapping", "message"),
    [
        ("libero:libero_goal", {}, "", "expected libero:SUITE/NUMBER, found 'libero:libero_goal'"),
        ("libero:libero_goal/x", {}, "", "expected libero:SUITE/NUMBER, found"),
        (
            "libero:libero_goal/0",
            {"state": None},
            'gripper = "left"',
            "gripper",
        ),
        ("libero:libero_goal/0", {}, "size = 0", "expected size as 1 to 1024 pixels, found 0"),
        (
            "libero:libero_goal/0",
            {},
            '[cameras]\nfront = "agentview"',
            r"found no image\.image0, image\.image1 and unknow",
        ),
        ("libero:libero_goal/0", {}, "speed = 1", "found speed, which is unknown"),
        ("libero:libero_goal/2", {}, "", "ValueError: expected a task from 0 to 1 of libero_goal, found 2; correct"),
        (
            "libero:libero_gaol/0",
            {},
            "",
            "ValueError: expected a suite out of libero_goal, libero_goal_lan, found 'libe",
        ),
    ],
)
def test_refuses(
    stand_in: None, spec: PolicySpec, tmp_path: Path, name: str, change: dict[str, Any], mapping: str, message: str
) -> None:
    (tmp_path / "libero.toml").write_text(mapping)
    with pytest.raises(UserError, match=message) as caught:
        open_environment(name, replace(spec, **change), tmp_path / "libero.toml" if mapping else None)
    assert "\n" not in str(caught.value)


def test_refuses_a_policy_of_another_robot(spec: PolicySpec, tiny_manifest: Any) -> None:
    """Before anything is started: there is no Python for LIBERO here."""
    with pytest.raises(UserError, match=r"expected state of shape \(3,\), found \(8,\).*found in libero:libero_goal/0"):
        open_environment("libero:libero_goal/0", replace(spec, state=tiny_manifest.policy.state))
    with pytest.raises(UserError, match="expected actions of 7 dimensions for libero:libero_goal/0, found 4"):
        open_environment("libero:libero_goal/0", replace(spec, action=tiny_manifest.policy.action))
    third = replace(spec.cameras[0], name="image2")
    with pytest.raises(UserError, match=r"found no image\.image2"):
        open_environment("libero:libero_goal/0", replace(spec, cameras=(*spec.cameras, third)))


def test_refuses_without_a_python(spec: PolicySpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RLRC_LIBERO_PYTHON", raising=False)
    with pytest.raises(
        UserError, match=r"expected RLRC_LIBERO_PYTHON to name the Python .* found it unset; run scripts"
    ):
        open_environment("libero:libero_goal/0", spec)
    monkeypatch.setenv("RLRC_LIBERO_PYTHON", "/nowhere/python")
    with pytest.raises(UserError, match=r"found /nowhere/python; run scripts/libero\.sh"):
        open_environment("libero:libero_goal/0", spec)


def test_a_simulator_that_fails(opened: libero.LiberoEnvironment) -> None:
    opened.reset(seed=0)
    with pytest.raises(
        UserError, match="exited with code 1: RuntimeError: the simulation is unstable; correct that, or"
    ):
        opened.advance(np.full(7, 77, np.float32))


def test_a_simulator_that_is_killed(opened: libero.LiberoEnvironment) -> None:
    opened.simulator._process.kill()
    with pytest.raises(
        UserError, match=r"expected an answer from the simulator of libero:libero_goal/1, .* by SIGKILL"
    ):
        opened.reset(seed=0)


def test_the_simulator_ends_with_its_environment(opened: libero.LiberoEnvironment) -> None:
    process = opened.simulator._process
    assert process.poll() is None
    opened.close()
    assert process.returncode == 0
    opened.close()  # again does no harm


HELLO = "import sys, struct, msgpack, time\nsys.stdout.buffer.write(%s)\nsys.stdout.flush()\ntime.sleep(60)\n"


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("b'Hello, world'", "found a message of 1214606444 bytes"),
        ("struct.pack('>I', 1) + b'\\xc1'", "found a message that is not msgpack"),
        ("struct.pack('>I', 1) + msgpack.packb(5)", "found a message that is a int"),
        ("(lambda m: struct.pack('>I', len(m)) + m)(msgpack.packb({'hello': 2}))", "expected protocol 1 .*, found 2"),
        ("b''", "found no answer within 1 s"),
    ],
)
def test_a_peer_that_speaks_nonsense_or_nothing(
    spec: PolicySpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, message: str
) -> None:
    monkeypatch.setenv("RLRC_LIBERO_PYTHON", interpreter(tmp_path, HELLO % said))
    monkeypatch.setattr(libero, "START_S", 1 if said == "b''" else 60)
    monkeypatch.setattr("rlrc.envs.subprocess_client.CLOSE_TIMEOUT_S", 0.1)
    with pytest.raises(UserError, match=message) as caught:
        open_environment("libero:libero_goal/0", spec)
    assert "\n" not in str(caught.value)


@pytest.fixture
def artifact(make_toy: Callable[..., Path], spec: PolicySpec, tmp_path: Path) -> Path:
    """Takes one camera and the words of the stand-in."""
    return make_toy(tmp_path / "toy", replace(spec, cameras=spec.cameras[:1]))


def test_commands_play_it(stand_in: None, artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(artifact), "--env", "libero:libero_goal/0", "--hz", "0", "--json"]) == 0
    (episode,) = json.loads(capsys.readouterr().out)["played"]
    assert episode["steps"] == 300 or episode["success"]
    names = [f"libero:libero_goal/{i}" for i in (0, 1)]
    benchmark = ["bench", "success", str(artifact), "--env", *names, "--workers", "1", "--json", "--episodes-per-task"]
    assert main([*benchmark, "2"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert {name: len(outcomes) for name, outcomes in row["outcomes"].items()} == dict.fromkeys(names, 2)
    assert main([*benchmark, "51"]) == 2
    assert "expected 1 to 50 episodes an environment (the initial states of a LIBERO task)" in capsys.readouterr().err


OFFICIAL = """
import sys
import numpy as np
from libero.libero import benchmark
from libero.libero.envs import OffScreenRenderEnv
suite = benchmark.get_benchmark_dict()["libero_spatial"]()
env = OffScreenRenderEnv(bddl_file_name=suite.get_task_bddl_file_path(0), camera_heights=256, camera_widths=256)
env.seed(0)
env.reset()
observation = env.set_init_state(suite.get_task_init_states(0)[3])
for _ in range(10):
    observation, _, _, _ = env.step([0, 0, 0, 0, 0, 0, -1])
for action in np.load(sys.argv[1]):
    observation, _, _, _ = env.step(action)
np.savez(sys.argv[2], **{k: v for k, v in observation.items() if isinstance(v, np.ndarray)})
"""


@pytest.mark.slow
@pytest.mark.skipif("RLRC_LIBERO_PYTHON" not in os.environ, reason="LIBERO is not installed (scripts/libero.sh)")
def test_the_real_simulator_shows_what_the_official_evaluation_sees(spec: PolicySpec, tmp_path: Path) -> None:
    """Against a script in the manner of OpenVLA's run_libero_eval, which renders at every step."""
    actions = np.random.default_rng(0).uniform(-1, 1, (3, 7)).astype(np.float32)
    np.save(tmp_path / "actions.npy", actions)
    (tmp_path / "official.py").write_text(OFFICIAL)
    command = [os.environ["RLRC_LIBERO_PYTHON"], "-I", str(tmp_path / "official.py")]
    subprocess.run([*command, tmp_path / "actions.npy", tmp_path / "seen.npz"], check=True, capture_output=True)

    env = open_environment("libero:libero_spatial/0", spec)
    env.reset(seed=3)
    for action in actions:
        env.advance(action)
    seen = env.observe()
    env.close()
    with np.load(tmp_path / "seen.npz") as official:
        for ours, theirs in (("image0", "agentview"), ("image1", "robot0_eye_in_hand")):
            assert np.array_equal(seen[f"image.{ours}"], official[f"{theirs}_image"][::-1, ::-1])
        np.testing.assert_allclose(seen["state"][:3], official["robot0_eef_pos"], rtol=1e-6)
        np.testing.assert_allclose(seen["state"][6:], official["robot0_gripper_qpos"], rtol=1e-5)
        turn = seen["state"][3:6]
        angle = np.linalg.norm(turn)
        quaternion = [*turn / angle * np.sin(angle / 2), np.cos(angle / 2)]
        np.testing.assert_allclose(quaternion, official["robot0_eef_quat"], atol=1e-6)
    assert seen["instruction"].startswith("pick up the black bowl between the plate and the ramekin")
