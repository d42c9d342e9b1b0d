"""The committed policy does its task through every protocol, all of one server, with the actions it has in-process."""

from __future__ import annotations

import base64
import json
import pickle
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clients import Gr00tClient, LerobotClient, TimedObservation, features, lerobot
from serving import Served

from rlrc.envs.metaworld import PICTURE, STATE_NAMES, make
from rlrc.envs.seeds import VALIDATION
from rlrc.runtime.inference.policy import LocalPolicy
from rlrc.runtime.servers.client import RemotePolicy

POLICY = Path(__file__).parents[1] / "reference/compressed"
TASK, SEED = "drawer-open-v3", VALIDATION[0]
OPENVLA = """
state = [["state"]]
instruction = ["instruction"]
[[cameras]]
key = ["image"]
layout = "HWC"
"""
Ask = Callable[[dict[str, Any]], Any]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    mapping = tmp_path_factory.mktemp("mapping") / "openvla.toml"
    mapping.write_text(OPENVLA)
    protocols = ("openpi", "openvla", "gr00t", "lerobot")
    with Served(POLICY, "--mapping", "openvla", str(mapping), protocols=protocols) as running:
        yield running


@contextmanager
def openpi(port: int) -> Iterator[Ask]:
    with RemotePolicy(f"ws://127.0.0.1:{port}", timeout_s=20) as policy:
        yield lambda observation: policy.infer(observation)["actions"]


@contextmanager
def openvla(port: int) -> Iterator[Ask]:
    def encoded(array: np.ndarray) -> dict[str, Any]:
        data = base64.b64encode(array.tobytes()).decode()
        return {"__numpy__": data, "dtype": array.dtype.str, "shape": array.shape}

    def ask(observation: dict[str, Any]) -> Any:
        picture, state = encoded(observation[PICTURE]), encoded(observation["state"])
        body = json.dumps({"image": picture, "state": state, "instruction": observation["instruction"]}).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{port}/act", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=20) as response:
            rows = json.load(response)
        return [np.frombuffer(base64.b64decode(row["__numpy__"]), row["dtype"]) for row in rows]

    yield ask


@contextmanager
def gr00t(port: int) -> Iterator[Ask]:
    with Gr00tClient(port) as client:

        def ask(observation: dict[str, Any]) -> Any:
            video = {PICTURE.removeprefix("image."): observation[PICTURE][None, None]}
            state = {"state": observation["state"][None, None]}
            language = {"instruction": [[observation["instruction"]]]}
            actions, _ = client.get_action({"video": video, "state": state, "language": language})
            return actions["action"][0]

        yield ask


@contextmanager
def lerobot_(port: int) -> Iterator[Ask]:
    camera, steps = PICTURE.removeprefix("image."), iter(range(10_000))
    with lerobot(), LerobotClient(port) as client:
        client.start(features(list(STATE_NAMES), {camera: (96, 96, 3)}))

        def ask(observation: dict[str, Any]) -> Any:
            motors = dict(zip(STATE_NAMES, observation["state"].tolist(), strict=True))
            raw = {**motors, camera: observation[PICTURE], "task": observation["instruction"]}
            client.send_observation(TimedObservation(0.0, next(steps), raw, must_go=True))
            return [action.action.numpy() for action in pickle.loads(client.get_actions())]

        yield ask


PROTOCOLS = {
    "openpi": openpi,
    "openvla": openvla,
    "gr00t": gr00t,
    "lerobot": lerobot_,
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_task_is_done_through_the_protocol(served: Served, protocol: str) -> None:
    policy, env = LocalPolicy.load(POLICY), make(TASK)
    observation, _ = env.reset(seed=SEED)
    with PROTOCOLS[protocol](served.ports[protocol]) as ask:
        while not env.over and env.steps < env.horizon:
            chunk = ask(observation)
            np.testing.assert_allclose(chunk, policy.infer(observation)["actions"], rtol=0, atol=1e-6)
            for action in chunk:
                if env.advance(action):
                    break
            observation = env.observe()
    assert env.over
