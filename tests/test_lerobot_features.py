"""What LeRobot's clients call their sensors: refused if no policy takes them, known again after a lost connection."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from clients import LerobotClient, RemotePolicyConfig, TimedObservation, features, lerobot
from serving import Served, wait_for
from test_serve_lerobot import FEATURES, MOTORS, PICTURE, WORDS, Evil, actions_of, refused, timed


@pytest.fixture(autouse=True)
def _classes() -> Iterator[None]:
    with lerobot():
        yield


@pytest.fixture(scope="module")
def expected(toy_artifact: Path) -> np.ndarray:
    return actions_of(toy_artifact)


@pytest.fixture
def served(toy_artifact: Path) -> Iterator[Served]:
    with Served(toy_artifact, protocols=("lerobot",)) as running:
        yield running


@pytest.fixture
def client(served: Served) -> Iterator[LerobotClient]:
    with LerobotClient(served.ports["lerobot"]) as one:
        one.start(FEATURES)
        yield one


def test_what_comes_too_early_is_refused(served: Served) -> None:
    with LerobotClient(served.ports["lerobot"]) as client:
        assert client.get_actions() == b""  # of a client that may have been here before: it is asked to go on
        unknown = TimedObservation(1700000000.0, 0, {"wheel.vel": 1.0, "task": WORDS})
        code, message = refused(lambda: client.send_observation(unknown))
        assert code == grpc.StatusCode.INVALID_ARGUMENT
        assert message == (
            "expected SendPolicyInstructions before observations, found none from a client with such sensors; start "
            "the client again"
        )


MORE = features([*MOTORS][::-1], {"corner4": (32, 32, 3), "wrist": (32, 32, 3)})


def test_a_client_goes_on_after_its_connection_was_lost(served: Served, expected: np.ndarray) -> None:
    with LerobotClient(served.ports["lerobot"]) as first:
        first.start(FEATURES)
        first.send_observation(timed(3))
        assert len(pickle.loads(first.get_actions())) == 3
    with LerobotClient(served.ports["lerobot"]) as other:  # another robot, which has more
        other.start(MORE, actions_per_chunk=1)
    with LerobotClient(served.ports["lerobot"]) as again:  # no Ready, no SendPolicyInstructions
        again.send_observation(timed(3))
        found = np.stack([action.action for action in pickle.loads(again.get_actions())])
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    with LerobotClient(served.ports["lerobot"]) as other:
        other.send_observation(timed(9, wrist=PICTURE))
        found = np.stack([action.action for action in pickle.loads(other.get_actions())])
        assert found.shape == (1, 4)
        assert np.abs(found - expected[:1]).max() > 1e-3  # its motors are in another order


def test_a_client_goes_on_after_a_restart_of_the_server(toy_artifact: Path, expected: np.ndarray) -> None:
    with Served(toy_artifact, protocols=("lerobot",)) as free:
        port = free.ports["lerobot"]
    with LerobotClient(port) as client:  # one connection object, as LeRobot's client keeps it
        for number in range(2):
            with Served(toy_artifact, protocols=("lerobot",), port=port):
                if not number:
                    client.start(FEATURES, actions_per_chunk=2)
                wait_for(lambda: client.channel_is_there())
                client.send_observation(timed(7 * number))
                found = np.stack([action.action for action in pickle.loads(client.get_actions())])
                np.testing.assert_allclose(found, expected[:2], rtol=0, atol=1e-6)


def test_clients_with_the_same_names_in_another_order_are_not_mixed_up(served: Served) -> None:
    turned = features([*MOTORS][::-1], {"corner4": (32, 32, 3)})
    with (
        LerobotClient(served.ports["lerobot"]) as one,
        LerobotClient(served.ports["lerobot"]) as other,
        LerobotClient(served.ports["lerobot"]) as again,
    ):
        one.start(FEATURES)
        other.start(turned)
        assert "found two clients with such sensors" in refused(lambda: again.send_observation(timed()))[1]
        other.start(FEATURES)


def test_wrong_instructions_are_refused(client: LerobotClient) -> None:
    config: Any = RemotePolicyConfig("act", "user/model", FEATURES, 50)
    cases: list[tuple[Any, str]] = [
        (Evil(), "found 'posix.system'"),
        (timed(), "expected LeRobot's RemotePolicyConfig"),
        (replace(config, lerobot_features=[]), "expected lerobot_features as a map, found list"),
        (replace(config, actions_per_chunk=0), "expected actions_per_chunk of 1 or more, found 0"),
        (replace(config, rename_map={"a": 1}), "expected a rename_map of texts"),
        (
            replace(config, lerobot_features={"observation.state": {"dtype": "float32", "names": "xyz"}}),
            "expected names of the numbers of observation.state",
        ),
        (replace(config, lerobot_features=features(list("x" * 2000), {})), "expected up to 1024 numbers"),
        # What can never fit is refused here, not at the first observation.
        (
            replace(config, lerobot_features=features(list(MOTORS), {"front": (32, 32, 3)})),
            "expected the cameras observation.images.corner4, found observation.images.front; rename",
        ),
        (
            replace(config, lerobot_features=features([*MOTORS, "wrist.pos"], {"corner4": (32, 32, 3)})),
            "numbers (x, y, grip), found 4 (shoulder.pos, elbow.pos, gripper.pos, wrist.pos); use the robot",
        ),
        (
            replace(config, lerobot_features=features(["a.pos", "b.pos", "a.pos"], {"corner4": (32, 32, 3)})),
            "expected every number of the client for one of the entries of the state, found a.pos for x and grip",
        ),
        (
            replace(config, lerobot_features=features(["grip", "x", "y"], {"corner4": (32, 32, 3)})),
            "expected the state in the policy's order, x, y, grip, found grip, x, y",
        ),
        (
            replace(config, lerobot_features=features([], {"corner4": (32, 32, 3)})),
            "expected a state of 3 numbers",
        ),
        (
            replace(config, lerobot_features={"observation.images.corner4": {"dtype": "image", "shape": (32, 32, 3)}}),
            "expected the state observation.state, found none",
        ),
        (
            replace(config, lerobot_features=features(list(MOTORS), {"corner4": (480, 640, 3)})),
            "expected observation.images.corner4 of shape (32, 32, 3), found (480, 640, 3)",
        ),
        (
            replace(config, lerobot_features=features(list(MOTORS), {"corner4": (32, 32, 1)})),
            "found (32, 32, 1)",
        ),
        (
            replace(
                config,
                lerobot_features=features(list(MOTORS), {"corner4": (32, 32, 3), "b": (32, 32, 3)}),
                rename_map={"observation.images.b": "observation.images.corner4"},
            ),
            "found two as observation.images.corner4; correct --rename_map",
        ),
    ]
    for wrong, message in cases:
        assert message in refused(lambda wrong=wrong: client.instruct(pickle.dumps(wrong)))[1]


def test_pictures_are_renamed_as_the_client_says(client: LerobotClient) -> None:
    named = features(list(MOTORS), {"laptop": (32, 32, 3)})
    renamed = {"observation.images.laptop": "observation.images.corner4"}
    client.instruct(pickle.dumps(RemotePolicyConfig("act", "m", named, 50, "cpu", renamed)))
    client.send_observation(timed(corner4=None, laptop=PICTURE))
    assert len(pickle.loads(client.get_actions())) == 3
