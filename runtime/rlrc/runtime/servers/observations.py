"""A client's observation to the policy's: which key is which camera, the state, the instruction. A small TOML says it.

    state = [["observation/state"]]        # concatenated in this order, in raw units
    instruction = ["prompt"]

    [[cameras]]
    key = ["observation/image"]            # ["images", "cam_high"] is a map in a map
    layout = "HWC"
    camera = "base_0_rgb"                  # the policy's; left out: the policy's cameras in their order

    [[actions]]                            # for GR00T's clients: how they split them, in the policy's order
    key = "single_arm"
    size = 5

What arrives has to be as declared: nothing is transposed, scaled or filled in because it looks as if it should be.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rlrc.artifact import CameraSpec, PolicySpec
from rlrc.errors import UserError
from rlrc.strict import check_distinct, read_toml

SHIPPED = Path(__file__).parent / "mappings"
OWN = "own"  # the policy's own names, as rlrc.runtime.inference.policy takes them
WORDS = 4096  # characters of an instruction

NAMED = 12  # names in a message

Key = tuple[str, ...]

# Where a protocol's clients put cameras (by name), the state and the instruction that are called as the policy does.
OWN_KEYS: dict[str, tuple[Key, Key, Key]] = {
    "gr00t": (("video", "{}"), ("state", "state"), ("language", "instruction")),
    "lerobot": (("observation.images.{}",), ("observation.state",), ("task",)),
}


@dataclass(frozen=True)
class Camera:
    """``layout`` is that of the client's uint8 picture: (height, width, 3) or (3, height, width)."""

    key: Key
    layout: Literal["HWC", "CHW"]
    camera: str | None = None


@dataclass(frozen=True)
class Columns:
    """``size`` dimensions of an action, by the name that GR00T's clients know them by."""

    key: str
    size: int


@dataclass(frozen=True)
class KeyMapping:
    """What a TOML file says. ``chunks``: whether an OpenVLA client takes a list of actions (OFT), or only one.

    ``actions``: how GR00T's clients split them; ``generation``: which of GR00T they are of.
    """

    cameras: tuple[Camera, ...]
    instruction: Key | None = None
    state: tuple[Key, ...] = ()
    chunks: bool = True
    actions: tuple[Columns, ...] = ()
    generation: Literal["N1.5", "N1.6"] = "N1.6"


@dataclass(frozen=True)
class Observations:
    """A mapping that fits a policy: ``cameras`` pairs of the client's and the policy's.

    ``instruction``: what is told the policy where the client says nothing.
    """

    mapping: KeyMapping
    cameras: tuple[tuple[Camera, CameraSpec], ...]
    spec: PolicySpec
    instruction: str | None = None

    def of(self, message: Any) -> dict[str, Any]:
        """The policy's observation. Raises UserError for a message that is not as the mapping declares it."""
        if not isinstance(message, dict):
            raise UserError(f"expected an observation as a map, found {type(message).__name__}; send a map")
        observation: dict[str, Any] = {}
        for camera, spec in self.cameras:
            found = _at(message, camera.key)
            if found is not None:
                observation[f"image.{spec.name}"] = _picture(found, camera)
            elif not spec.optional:
                raise _missing(camera.key, message)
        if self.spec.state is not None:
            observation["state"] = self._state(message)
        if self.spec.prompt is not None:
            observation["instruction"] = self._instruction(message)
        if "noise" in message:
            observation["noise"] = _noise(message["noise"])
        return observation

    def _state(self, message: Mapping[str, Any]) -> NDArray[np.floating]:
        parts = []
        for key in self.mapping.state:
            found = _at(message, key)
            if found is None:
                raise _missing(key, message)
            try:
                part = np.atleast_1d(np.asarray(found))
            except ValueError:
                part = np.zeros(0, object)
            if part.dtype.kind != "f" or part.ndim != 1:
                raise UserError(f"expected {_told(key)} as a row of floats, found {_form(found)}; send floats (n,)")
            parts.append(part)
        return np.concatenate(parts)

    def _instruction(self, message: Mapping[str, Any]) -> str:
        found = None if self.mapping.instruction is None else _at(message, self.mapping.instruction)
        if isinstance(found, str):
            return _words(found)
        if found is not None:
            raise UserError(f"expected an instruction as text, found {_form(found)}; send text")
        if self.instruction is None:
            raise UserError(
                f"expected an instruction at {_told(self.mapping.instruction or ())}, found "
                f"{_found(self.mapping.instruction or (), message)}; send one, or start the server with --instruction"
            )
        return self.instruction

    @property
    def told(self) -> list[str]:
        """Which key is what, in words: for the metadata and the operator."""
        lines = [f"{_told(one.key)} ({one.layout}) -> camera {spec.name}" for one, spec in self.cameras]
        if self.spec.state is not None:
            keys = " + ".join(map(_told, self.mapping.state))
            lines.append(f"{keys} -> state {', '.join(self.spec.state.names)}")
        if self.spec.prompt is not None and self.mapping.instruction is not None:
            lines.append(f"{_told(self.mapping.instruction)} -> instruction")
        return lines


def shipped() -> list[str]:
    """The names of the mappings that come with rlrc, and of the policy's own names."""
    return [OWN, *sorted(path.stem for path in SHIPPED.glob("*.toml"))]


def load(name: str | Path, spec: PolicySpec, instruction: str | None = None, protocol: str = "openpi") -> Observations:
    """A mapping by its name, or a TOML file, for a policy. Raises UserError if it is none or does not fit."""
    mapping = _own(spec, protocol) if name == OWN else _read(name)
    wired = _wired(mapping, spec, name)
    if spec.state is not None and not mapping.state:
        raise UserError(f"expected keys of the state in the mapping {name}, found none; the policy takes one: add them")
    if spec.prompt is not None and mapping.instruction is None and instruction is None:
        raise UserError(f"expected the key of the instruction in the mapping {name}, found none; give --instruction")
    sizes = [columns.size for columns in mapping.actions]
    if sizes and (min(sizes) < 1 or sum(sizes) != spec.action.dim):
        raise UserError(
            f"expected actions of {spec.action.dim} dimensions in the mapping {name}, found {sizes}; correct it"
        )
    return Observations(mapping, wired, spec, instruction)


def _own(spec: PolicySpec, protocol: str) -> KeyMapping:
    camera, state, instruction = OWN_KEYS.get(protocol, (("image.{}",), ("state",), ("instruction",)))
    cameras = tuple(
        Camera(tuple(part.replace("{}", one.name) for part in camera), "HWC", one.name) for one in spec.cameras
    )
    return KeyMapping(cameras, instruction, (state,))


def _read(name: str | Path) -> KeyMapping:
    path = SHIPPED / f"{name}.toml" if str(name) in shipped() else Path(name)
    expected = f"a mapping (a TOML file, or one of {', '.join(shipped())}) at {path}"
    return read_toml(KeyMapping, path, expected, "correct it or give another --mapping (docs/serving.md)")


def _wired(mapping: KeyMapping, spec: PolicySpec, name: str | Path) -> tuple[tuple[Camera, CameraSpec], ...]:
    named = {camera.camera for camera in mapping.cameras if camera.camera is not None}
    cameras = {camera.name: camera for camera in spec.cameras}
    if strange := sorted(named - cameras.keys()):
        raise UserError(
            f"expected cameras among {', '.join(cameras)} in the mapping {name}, found {strange[0]}; rename it"
        )
    unnamed = [camera for camera in spec.cameras if camera.name not in named]
    wired = []
    for camera in mapping.cameras:
        if camera.camera is not None:
            wired.append((camera, cameras[camera.camera]))
        elif unnamed:
            wired.append((camera, unnamed.pop(0)))
    if len({one.name for _, one in wired}) != len(wired):
        raise UserError(f"expected every camera once in the mapping {name}, found one twice; correct it")
    source, where = "key of the client", f"the mapping {name}"
    check_distinct({one.name: camera.key for camera, one in wired}, source, "cameras of the policy", where)
    for what, keys in (("state", mapping.state), ("actions", tuple((one.key,) for one in mapping.actions))):
        check_distinct({f"part {place + 1}": key for place, key in enumerate(keys)}, source, f"parts of {what}", where)
    if lacking := [one.name for one in spec.cameras if not one.optional and one not in [spec for _, spec in wired]]:
        raise UserError(
            f"expected a key of camera {lacking[0]} in the mapping {name}, found none; write your own mapping"
        )
    return tuple(wired)


def _picture(found: Any, camera: Camera) -> NDArray[np.uint8]:
    """-> uint8 (H, W, 3)."""
    axis = 2 if camera.layout == "HWC" else 0
    if not isinstance(found, np.ndarray) or found.dtype != np.uint8 or found.ndim != 3 or found.shape[axis] != 3:
        form = "(height, width, 3)" if camera.layout == "HWC" else "(3, height, width)"
        raise UserError(
            f"expected {_told(camera.key)} as uint8 {form}, found {_form(found)}; send it so, or declare another layout"
        )
    return found if camera.layout == "HWC" else np.ascontiguousarray(found.transpose(1, 2, 0))


def _words(found: str) -> str:
    """JSON can hold half characters, which no tokenizer takes; and a tokenizer takes seconds for megabytes."""
    if len(found) > WORDS:
        raise UserError(f"expected an instruction of up to {WORDS} characters, found {len(found)}; say less")
    try:
        found.encode()
    except UnicodeEncodeError:
        raise UserError("expected an instruction in Unicode, found half characters; send whole ones") from None
    return found


def _noise(found: Any) -> NDArray[np.floating]:
    """Anything else would not even reach the policy, which checks its shape."""
    if not isinstance(found, np.ndarray) or found.dtype.kind != "f":
        raise UserError(f"expected noise as an array of floats, found {_form(found)}; leave it out to have it drawn")
    return found


def _at(message: Mapping[str, Any], key: Key) -> Any:
    """What is there, None if nothing is."""
    found: Any = message
    for part in key:
        found = found.get(part) if isinstance(found, dict) else None
    return found


def _missing(key: Key, message: Mapping[Any, Any]) -> UserError:
    return UserError(
        f"expected {_told(key)} in the observation, found {_found(key, message)}; send it, or use another --mapping"
    )


def _found(key: Key, message: Mapping[Any, Any]) -> str:
    """What there is instead of something that is needed."""
    found: Any = message
    for part in key:
        if not isinstance(found, dict) or part not in found:
            return listed(_paths(message))
        found = found[part]
    return f"{brief(found)} there"


def _paths(message: Mapping[Any, Any]) -> list[str]:
    """The names in a message, those of a map in a map behind its own."""
    paths = []
    for name, value in message.items():
        inner = [f"{name}.{key}" for key in value] if isinstance(value, dict) else []
        paths += inner or [str(name)]
    return sorted(paths)


def listed(names: Iterable[object]) -> str:
    """A client's names for things, fit for a message of one line: the first of many."""
    first = list(islice(names, NAMED + 1))
    return ", ".join(map(shown, first[:NAMED])) + (", ..." if len(first) > NAMED else "") or "none"


def shown(name: object) -> str:
    """A client's name for something, fit for a message of one line."""
    return ascii(str(name)[:40])[1:-1]


def brief(value: Any) -> str:
    """A peer's value for a message: numbers as they are, of other things what they are."""
    if value is None or isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**64):
        return str(value)
    if isinstance(value, int):
        return "an integer of more than 64 bits"
    return f"'{shown(value)}'" if isinstance(value, str) else type(value).__name__


def _told(key: Key) -> str:
    return ".".join(key)


def _form(found: Any) -> str:
    return f"{found.dtype} {found.shape}" if isinstance(found, np.ndarray) else type(found).__name__
