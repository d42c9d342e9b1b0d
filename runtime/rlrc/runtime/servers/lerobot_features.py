"""The sensor names of LeRobot's clients: read from SendPolicyInstructions, checked against the policy, remembered.

A client sends them once, when it starts. After a lost connection or a restart of the server it only sends observations.
The newest features are therefore kept in memory and in a file (``state_folder``), and a client that reconnects is
recognised by the names of its sensors, which every observation contains.
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
from rlrc.runtime.servers.observations import Observations
from rlrc.runtime.servers.quoting import describe_value, escape_name, list_names
from rlrc.runtime.wire import pickles
from rlrc.runtime.wire.pickles import Call
from rlrc.strict import check_distinct

MAX_NUMBERS = 1024  # in a state
MAX_SENSORS = 32  # cameras, and parts of a state
MAX_NAME = 200  # characters
REMEMBERED = 32  # clients
CLIENT = "use LeRobot's client"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Features:
    """``states``: key to the names of its numbers; ``pictures``: key to camera; ``actions``: wanted chunk length."""

    states: dict[str, tuple[str, ...]]
    pictures: dict[str, str]
    renamed: dict[str, str]
    actions: int

    @property
    def sensors(self) -> frozenset[str]:
        """The names of all sensors in an observation."""
        return frozenset(self.pictures.values()).union(*self.states.values())

    def frame(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Convert a robot's observation to the keys of LeRobot's data sets. Raises UserError."""
        frame: dict[str, Any] = {"task": raw["task"]} if "task" in raw else {}
        if isinstance(frame.get("task"), Call):
            raise UserError(f"expected the task as text, found {frame['task'].function.name}; send text")
        for key, names in self.states.items():
            frame[self.name(key)] = np.array([_read_number(raw, name) for name in names])
        for key, name in self.pictures.items():
            if name in raw:
                frame[self.name(key)] = pickles.array(raw[name])
        return frame

    def name(self, key: str) -> str:
        """A feature's name after the client's ``rename_map``."""
        return self.renamed.get(key, key)


@dataclass(frozen=True)
class _FeatureFile:
    clients: tuple[Features, ...] = ()


class RememberedFeatures:
    """The features of the last clients, the newest last; in a file too, once it is open."""

    def __init__(self) -> None:
        self._clients: dict[frozenset[str], Features] = {}
        self._file: Path | None = None

    def open(self, file: Path) -> None:
        """Read what an earlier server left in ``file``, and keep it up to date from now on."""
        self._file = file
        try:
            for one in strict.decode(_FeatureFile, strict.parse(file.read_bytes())).clients:
                self._clients[one.sensors] = one
        except FileNotFoundError:
            return
        except (OSError, UserError) as error:
            log.warning("expected the features of LeRobot's clients in %s, found: %s; it will be replaced", file, error)

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
                "expected to write %s, found: %s; after a restart of this server, restart its LeRobot clients",
                self._file,
                error,
            )
            self._file = None

    def find(self, raw: Mapping[str, Any], connected: Iterable[Features]) -> Features:
        """The features of a known client that sent this observation. Raises UserError if none or several match.

        ``connected``: the features of the clients now connected; one with the same names in another order is ambiguous.
        """
        fitting = [one for one in self._clients.values() if one.sensors and one.sensors <= raw.keys()]
        most = max((len(one.sensors) for one in fitting), default=0)
        fitting = [one for one in fitting if len(one.sensors) == most]
        others = [one for one in connected if fitting and one.sensors == fitting[0].sensors]
        orders = [(list(one.states.items()), one.pictures, one.renamed) for one in [*fitting, *others]]
        if not fitting or any(order != orders[0] for order in orders):
            found = "two clients with such sensors" if fitting else "none from a client with such sensors"
            raise UserError(
                f"expected SendPolicyInstructions before observations, found {found}; start the client again"
            )
        return fitting[-1]


def state_folder() -> Path:
    """systemd's state folder, or the user's."""
    given = os.environ.get("STATE_DIRECTORY", "").split(":")[0]
    if given:
        return Path(given)
    states = os.environ.get("XDG_STATE_HOME")
    return (Path(states) if states else Path.home() / ".local/state") / "rlrc"


def read(policy: Any, observations: Observations) -> Features:
    """Read a RemotePolicyConfig. Raises UserError if it is invalid or the policy cannot take its sensors."""
    state = fields(policy, "RemotePolicyConfig")
    features, actions, renamed = (state.get(name) for name in ("lerobot_features", "actions_per_chunk", "rename_map"))
    if not isinstance(features, dict):
        raise UserError(f"expected lerobot_features as a map, found {type(features).__name__}; {CLIENT}")
    if type(actions) is not int or actions < 1:
        raise UserError(
            f"expected actions_per_chunk of 1 or more, found {describe_value(actions)}; correct --actions_per_chunk"
        )
    renamed = {} if renamed is None else renamed
    if not isinstance(renamed, dict) or not all(isinstance(name, str) for name in renamed.values()):
        raise UserError(f"expected a rename_map of texts, found {describe_value(renamed)}; {CLIENT}")
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
                    f"expected names of the numbers of {escape_name(key)} as a list of texts, found "
                    f"{describe_value(names)}; {CLIENT}"
                )
            states[key] = tuple(names)
    if (count := sum(map(len, states.values()))) > MAX_NUMBERS:  # a pickle may repeat one list a thousand times
        raise UserError(f"expected up to {MAX_NUMBERS} numbers in a state, found {count}; {CLIENT}")
    if (count := max(len(pictures), len(states))) > MAX_SENSORS:
        raise UserError(f"expected up to {MAX_SENSORS} cameras and as many states, found {count}; {CLIENT}")
    used = {key: name for key, name in renamed.items() if key in states or key in pictures}
    names = [*used.values(), *states, *pictures, *chain.from_iterable(states.values())]
    if (longest := max(map(len, names), default=0)) > MAX_NAME:
        raise UserError(f"expected names of up to {MAX_NAME} characters, found one of {longest}; {CLIENT}")
    found = Features(states, pictures, used, actions)
    check(found, observations)
    _check_shapes(found, shapes, observations)
    return found


def check(features: Features, observations: Observations) -> None:
    """Raises UserError for sensors that the policy cannot take."""
    cameras, states = (list(map(features.name, names)) for names in (features.pictures, features.states))
    for key in cameras + states:
        if (cameras + states).count(key) > 1:
            raise UserError(f"expected a name for each sensor, found two as {escape_name(key)}; correct --rename_map")
    advice = "rename the robot's cameras, or give --rename_map to the client, or --mapping lerobot FILE to the server"
    wanted = {".".join(camera.key): spec for camera, spec in observations.cameras}
    lacking = [key for key, spec in wanted.items() if key not in cameras and not spec.optional]
    if lacking or (wanted and not wanted.keys() & set(cameras)):
        raise UserError(f"expected the cameras {list_names(lacking or wanted)}, found {list_names(cameras)}; {advice}")
    if unused := [key for key in cameras if key not in wanted]:
        empty = [key for key in wanted if key not in cameras]
        log.warning(
            "lerobot: the client's cameras %s are not used%s",
            list_names(unused),
            f", and the policy's {list_names(empty)} stay empty" if empty else "",
        )
    if (spec := observations.spec.state) is None:
        return
    keys = [".".join(key) for key in observations.mapping.state]
    if lacking := [key for key in keys if key not in states]:
        raise UserError(
            f"expected the state {list_names(lacking)}, found {list_names(states)}; give --rename_map to the client, "
            "or --mapping lerobot FILE to the server"
        )
    rows = {features.name(key): row for key, row in features.states.items()}
    numbers = list(chain.from_iterable(rows[key] for key in keys))
    if len(numbers) != len(spec.names):
        raise UserError(
            f"expected a state of {len(spec.names)} numbers ({list_names(spec.names)}), found {len(numbers)} "
            f"({list_names(numbers)}); use the robot that the policy was trained on, or its policy"
        )
    wires = dict(zip(spec.names, numbers, strict=True))
    check_distinct(wires, "number of the client", "entries of the state", "the robot's motors")
    if set(numbers) == set(spec.names) and tuple(numbers) != spec.names:
        raise UserError(
            f"expected the state in the policy's order, {', '.join(map(escape_name, spec.names))}, found "
            f"{', '.join(map(escape_name, numbers))}; give the robot's motors in that order"
        )


def _check_shapes(features: Features, shapes: Mapping[str, Any], observations: Observations) -> None:
    for camera, spec in observations.cameras:
        for key, shape in shapes.items():
            if features.name(key) == ".".join(camera.key):
                _check_shape(key, shape, camera.layout, spec)


def _check_shape(key: str, shape: Any, layout: str, spec: CameraSpec) -> None:
    """``shape``: three numbers, as LeRobot declares it. A depth camera has one channel."""
    if not isinstance(shape, tuple | list) or len(shape) != 3 or not all(type(size) is int for size in shape):
        return  # each image is checked anyway
    height, width, channels = shape if layout == "HWC" else (*shape[1:], shape[0])
    fixed = (spec.height, spec.width) if spec.resize == "none" else (height, width)
    if channels != 3 or (height, width) != fixed:
        size = f"{fixed[0]}, {fixed[1]}" if spec.resize == "none" else "height, width"
        expected = f"({size}, 3)" if layout == "HWC" else f"(3, {size})"
        raise UserError(
            f"expected {escape_name(key)} of shape {expected}, found {tuple(shape)}; change the camera's settings"
        )


def fields(message: Any, name: str) -> dict[str, Any]:
    """The fields of an instance of LeRobot's class ``name``. Raises UserError."""
    if isinstance(message, Call) and message.function.name == name and isinstance(message.state, dict):
        return message.state
    found = message.function.name if isinstance(message, Call) else type(message).__name__
    found = "one without fields" if found == name else found
    raise UserError(f"expected LeRobot's {name}, found {found}; {CLIENT}")


def _read_number(raw: Mapping[str, Any], name: str) -> float:
    if name not in raw:
        raise UserError(f"expected the number {escape_name(name)} in the observation, found {list_names(raw)}; send it")
    value = raw[name]
    if isinstance(value, Call):
        array = pickles.array(value)
        if array.ndim:
            raise UserError(
                f"expected {escape_name(name)} as a number, found an array {array.shape}; check that sensor"
            )
        value = array.item()
    if not isinstance(value, (int, float)):
        raise UserError(f"expected {escape_name(name)} as a number, found {describe_value(value)}; check that sensor")
    if not abs(value) < 2**127:  # float32's range; and no NaN
        raise UserError(
            f"expected {escape_name(name)} as a finite number, found {describe_value(value)}; check that sensor"
        )
    return float(value)
