"""What LeRobot's clients call their sensors: read from SendPolicyInstructions, checked against the policy, remembered.

LeRobot's client says it once, when it starts. After a lost connection, or a restart of the server, it goes on with
observations. So the newest are kept, in memory and in a file in the user's state folder (``state_folder``), and a
client that comes back is known by the names of its sensors, which every observation has.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from rlrc import strict
from rlrc.artifact import CameraSpec
from rlrc.errors import UserError
from rlrc.folders import replace_file
from rlrc.runtime.servers.observations import Observations, brief, listed, shown
from rlrc.runtime.wire import pickles
from rlrc.runtime.wire.pickles import Call
from rlrc.strict import check_distinct

NUMBERS = 1024  # of a robot's state
SENSORS = 32  # cameras, and parts of a state
NAME = 200  # characters
REMEMBERED = 32
CLIENT = "use LeRobot's client"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Features:
    """What the client calls its sensors: state -> its numbers, pictures; and how many actions it wants of a chunk."""

    states: dict[str, tuple[str, ...]]
    pictures: dict[str, str]
    renamed: dict[str, str]
    actions: int

    @property
    def sensors(self) -> frozenset[str]:
        """Their names in an observation."""
        return frozenset(self.pictures.values()).union(*self.states.values())

    def frame(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """A robot's observation as LeRobot's data sets call it. Raises UserError."""
        frame: dict[str, Any] = {"task": raw["task"]} if "task" in raw else {}
        if isinstance(frame.get("task"), Call):
            raise UserError(f"expected the task as text, found what {frame['task'].function.name} makes; send text")
        for key, names in self.states.items():
            frame[self.name(key)] = np.array([_number(raw, name) for name in names])
        for key, name in self.pictures.items():
            if name in raw:
                frame[self.name(key)] = pickles.array(raw[name])
        return frame

    def name(self, key: str) -> str:
        """A feature after the client's ``rename_map``."""
        return self.renamed.get(key, key)


@dataclass(frozen=True)
class _FeatureFile:
    clients: tuple[Features, ...] = ()


class Known:
    """The features of the clients that have introduced themselves, the newest last; in ``file``, if there is one."""

    def __init__(self) -> None:
        self._clients: dict[frozenset[str], Features] = {}
        self._file: Path | None = None

    def open(self, file: Path) -> None:
        """Reads what an earlier server has left there, and writes to it from now on."""
        self._file = file
        try:
            for one in strict.decode(_FeatureFile, strict.parse(file.read_bytes())).clients:
                self._clients[one.sensors] = one
        except FileNotFoundError:
            return
        except (OSError, UserError) as error:
            log.warning("expected the features of LeRobot's clients in %s, found: %s; it is written anew", file, error)

    def add(self, features: Features) -> None:
        if next(reversed(self._clients.values()), None) == features:
            return
        self._clients.pop(features.sensors, None)
        self._clients[features.sensors] = features
        while len(self._clients) > REMEMBERED:
            del self._clients[next(iter(self._clients))]
        if self._file is None:
            return
        text = json.dumps(strict.encode(_FeatureFile(tuple(self._clients.values()))), indent=1)
        try:
            with replace_file(self._file) as partial:
                partial.write_text(text, encoding="utf-8")
        except (OSError, UserError) as error:
            log.warning(
                "expected to write %s, found: %s; after a restart of this server its LeRobot clients have to be "
                "started again",
                self._file,
                error,
            )
            self._file = None

    def find(self, raw: Mapping[str, Any], living: Iterable[Features]) -> Features:
        """Of a client that sends this observation, having introduced itself before. Raises UserError.

        ``living``: of the clients that are there. One with the same names in another order would be mistaken for it.
        """
        fitting = [one for one in self._clients.values() if one.sensors and one.sensors <= raw.keys()]
        most = max((len(one.sensors) for one in fitting), default=0)
        fitting = [one for one in fitting if len(one.sensors) == most]
        others = [one for one in living if fitting and one.sensors == fitting[0].sensors]
        orders = [(list(one.states.items()), one.pictures, one.renamed) for one in [*fitting, *others]]
        if not fitting or any(order != orders[0] for order in orders):
            found = "two clients with such sensors" if fitting else "none from a client with such sensors"
            raise UserError(
                f"expected SendPolicyInstructions before observations, found {found}; start the client again"
            )
        return fitting[-1]


def state_folder() -> Path:
    """Where services keep what has to survive them: systemd's, or the user's."""
    given = os.environ.get("STATE_DIRECTORY", "").split(":")[0]
    if given:
        return Path(given)
    states = os.environ.get("XDG_STATE_HOME")
    return (Path(states) if states else Path.home() / ".local/state") / "rlrc"


def read(policy: Any, observations: Observations) -> Features:
    """Of a RemotePolicyConfig. Raises UserError for what is none, and for sensors that the policy can never take."""
    state = fields(policy, "RemotePolicyConfig")
    features, actions, renamed = (state.get(name) for name in ("lerobot_features", "actions_per_chunk", "rename_map"))
    if not isinstance(features, dict):
        raise UserError(f"expected lerobot_features as a map, found {type(features).__name__}; {CLIENT}")
    if type(actions) is not int or actions < 1:
        raise UserError(f"expected actions_per_chunk of 1 or more, found {brief(actions)}; correct --actions_per_chunk")
    renamed = {} if renamed is None else renamed
    if not isinstance(renamed, dict) or not all(isinstance(name, str) for name in renamed.values()):
        raise UserError(f"expected a rename_map of texts, found {brief(renamed)}; {CLIENT}")
    states: dict[str, tuple[str, ...]] = {}
    pictures, shapes = {}, {}
    for key, feature in features.items():
        if not isinstance(feature, dict):
            continue
        kind, names = feature.get("dtype"), feature.get("names")
        if kind in ("image", "video") and key.startswith("observation.images."):
            pictures[key], shapes[key] = key.removeprefix("observation.images."), feature.get("shape")
        elif kind == "float32" and key.startswith("observation."):
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise UserError(
                    f"expected names of the numbers of {shown(key)} as a list of texts, found {brief(names)}; {CLIENT}"
                )
            states[key] = tuple(names)
    if (count := sum(map(len, states.values()))) > NUMBERS:  # a pickle may have one list a thousand times
        raise UserError(f"expected up to {NUMBERS} numbers in a state, found {count}; {CLIENT}")
    if (count := max(len(pictures), len(states))) > SENSORS:
        raise UserError(f"expected up to {SENSORS} cameras and as many states, found {count}; {CLIENT}")
    used = {key: name for key, name in renamed.items() if key in states or key in pictures}
    names = [*used.values(), *states, *pictures, *chain.from_iterable(states.values())]
    if (longest := max(map(len, names), default=0)) > NAME:
        raise UserError(f"expected names of up to {NAME} characters, found one of {longest}; {CLIENT}")
    found = Features(states, pictures, used, actions)
    check(found, observations)
    _check_shapes(found, shapes, observations)
    return found


def check(features: Features, observations: Observations) -> None:
    """Raises UserError for sensors that the policy can never take, whatever they measure."""
    cameras, states = (list(map(features.name, names)) for names in (features.pictures, features.states))
    for key in cameras + states:
        if (cameras + states).count(key) > 1:
            raise UserError(f"expected a name for each sensor, found two as {shown(key)}; correct --rename_map")
    advice = "name the robot's cameras so, or give --rename_map to the client, or --mapping lerobot FILE to the server"
    wanted = {".".join(camera.key): spec for camera, spec in observations.cameras}
    lacking = [key for key, spec in wanted.items() if key not in cameras and not spec.optional]
    if lacking or (wanted and not wanted.keys() & set(cameras)):
        raise UserError(f"expected the cameras {listed(lacking or wanted)}, found {listed(cameras)}; {advice}")
    if unused := [key for key in cameras if key not in wanted]:
        empty = [key for key in wanted if key not in cameras]
        log.warning(
            "lerobot: the client's cameras %s are not used%s",
            listed(unused),
            f", and the policy's {listed(empty)} stay empty" if empty else "",
        )
    if (spec := observations.spec.state) is None:
        return
    keys = [".".join(key) for key in observations.mapping.state]
    if lacking := [key for key in keys if key not in states]:
        raise UserError(
            f"expected the state {listed(lacking)}, found {listed(states)}; give --rename_map to the client, or "
            "--mapping lerobot FILE to the server"
        )
    rows = {features.name(key): row for key, row in features.states.items()}
    numbers = list(chain.from_iterable(rows[key] for key in keys))
    if len(numbers) != len(spec.names):
        raise UserError(
            f"expected a state of {len(spec.names)} numbers ({listed(spec.names)}), found {len(numbers)} "
            f"({listed(numbers)}); use the robot that the policy was trained on, or its policy"
        )
    wires = dict(zip(spec.names, numbers, strict=True))
    check_distinct(wires, "number of the client", "entries of the state", "the robot's motors")
    if set(numbers) == set(spec.names) and tuple(numbers) != spec.names:
        raise UserError(
            f"expected the state in the policy's order, {', '.join(map(shown, spec.names))}, found "
            f"{', '.join(map(shown, numbers))}; give the robot's motors in that order"
        )


def _check_shapes(features: Features, shapes: Mapping[str, Any], observations: Observations) -> None:
    for camera, spec in observations.cameras:
        for key, shape in shapes.items():
            if features.name(key) == ".".join(camera.key):
                _check_shape(key, shape, camera.layout, spec)


def _check_shape(key: str, shape: Any, layout: str, spec: CameraSpec) -> None:
    """As LeRobot says it: of three numbers. A depth camera has one channel."""
    if not isinstance(shape, tuple | list) or len(shape) != 3 or not all(type(size) is int for size in shape):
        return  # what it really sends is looked at in any case
    height, width, channels = shape if layout == "HWC" else (*shape[1:], shape[0])
    fixed = (spec.height, spec.width) if spec.resize == "none" else (height, width)
    if channels != 3 or (height, width) != fixed:
        size = f"{fixed[0]}, {fixed[1]}" if spec.resize == "none" else "height, width"
        expected = f"({size}, 3)" if layout == "HWC" else f"(3, {size})"
        raise UserError(
            f"expected {shown(key)} of shape {expected}, found {tuple(shape)}; set the camera so, or give another"
        )


def fields(message: Any, name: str) -> dict[str, Any]:
    """The state of one of LeRobot's classes. Raises UserError."""
    if isinstance(message, Call) and message.function.name == name and isinstance(message.state, dict):
        return message.state
    found = message.function.name if isinstance(message, Call) else type(message).__name__
    found = "one without fields" if found == name else found
    raise UserError(f"expected LeRobot's {name}, found {found}; {CLIENT}")


def _number(raw: Mapping[str, Any], name: str) -> float:
    if name not in raw:
        raise UserError(f"expected the number {shown(name)} in the observation, found {listed(raw)}; send it")
    value = raw[name]
    if isinstance(value, Call):
        array = pickles.array(value)
        if array.ndim:
            raise UserError(f"expected {shown(name)} as a number, found an array {array.shape}; check that sensor")
        value = array.item()
    if not isinstance(value, (int, float)):
        raise UserError(f"expected {shown(name)} as a number, found {brief(value)}; check that sensor")
    if not abs(value) < 2**127:  # float32's range; and no NaN
        raise UserError(f"expected {shown(name)} as a finite number, found {brief(value)}; check that sensor")
    return float(value)
