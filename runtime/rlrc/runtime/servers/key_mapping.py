"""Mappings from a client's keys to the policy's cameras, state and instruction: small TOML files.

state = [["observation/state"]]        # concatenated in this order, in raw units
instruction = ["prompt"]

[[cameras]]
key = ["observation/image"]            # ["images", "cam_high"] is a map in a map
layout = "HWC"
camera = "base_0_rgb"                  # the policy's camera; default: the policy's cameras in order

[[actions]]                            # for GR00T's clients: the names of action columns, in the policy's order
key = "single_arm"
size = 5
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rlrc.artifact import CameraSpec, PolicySpec
from rlrc.errors import UserError
from rlrc.strict import check_distinct, read_toml

MAPPINGS = Path(__file__).parent / "mappings"
OWN = "own"  # the policy's own names, as rlrc.runtime.inference.policy takes them

Key = tuple[str, ...]

# Keys of cameras (by name), state and instruction in a protocol, for mapping "own".
OWN_KEYS: dict[str, tuple[Key, Key, Key]] = {
    "gr00t": (("video", "{}"), ("state", "state"), ("language", "instruction")),
    "lerobot": (("observation.images.{}",), ("observation.state",), ("task",)),
}


@dataclass(frozen=True)
class Camera:
    """``layout``: of the client's uint8 image, (height, width, 3) or (3, height, width)."""

    key: Key
    layout: Literal["HWC", "CHW"]
    camera: str | None = None


@dataclass(frozen=True)
class Columns:
    """``size`` dimensions of an action under the name ``key`` of GR00T's clients."""

    key: str
    size: int


@dataclass(frozen=True)
class KeyMapping:
    """The contents of a TOML file. ``chunks``: OpenVLA's clients take a list of actions (OFT) instead of one.

    ``actions``: the columns of GR00T's clients; ``generation``: their version.
    """

    cameras: tuple[Camera, ...]
    instruction: Key | None = None
    state: tuple[Key, ...] = ()
    chunks: bool = True
    actions: tuple[Columns, ...] = ()
    generation: Literal["N1.5", "N1.6"] = "N1.6"


def list_mappings() -> list[str]:
    """The names of the mappings that come with rlrc, including "own"."""
    return [OWN, *sorted(path.stem for path in MAPPINGS.glob("*.toml"))]


def own_mapping(spec: PolicySpec, protocol: str) -> KeyMapping:
    camera, state, instruction = OWN_KEYS.get(protocol, (("image.{}",), ("state",), ("instruction",)))
    cameras = tuple(
        Camera(tuple(part.replace("{}", one.name) for part in camera), "HWC", one.name) for one in spec.cameras
    )
    return KeyMapping(cameras, instruction, (state,))


def read_mapping(name: str | Path) -> KeyMapping:
    path = MAPPINGS / f"{name}.toml" if str(name) in list_mappings() else Path(name)
    expected = f"a mapping (a TOML file, or one of {', '.join(list_mappings())}) at {path}"
    return read_toml(KeyMapping, path, expected, "correct it or give another --mapping (docs/serving.md)")


def match_cameras(mapping: KeyMapping, spec: PolicySpec, name: str | Path) -> tuple[tuple[Camera, CameraSpec], ...]:
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
