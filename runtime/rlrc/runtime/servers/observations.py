"""From a client's message to the policy's observation, by a mapping of keys (rlrc.runtime.servers.key_mapping).

Values have to be as the mapping declares them: nothing is transposed, scaled or filled in by guessing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlrc.artifact import CameraSpec, PolicySpec
from rlrc.errors import UserError
from rlrc.runtime.servers.key_mapping import OWN, Camera, Key, KeyMapping, match_cameras, own_mapping, read_mapping
from rlrc.runtime.servers.quoting import describe_value, list_names

MAX_INSTRUCTION = 4096  # characters of an instruction


@dataclass(frozen=True)
class Observations:
    """A mapping that fits a policy. ``cameras``: pairs of the client's camera and the policy's.

    ``instruction``: the default where the client sends none.
    """

    mapping: KeyMapping
    cameras: tuple[tuple[Camera, CameraSpec], ...]
    spec: PolicySpec
    instruction: str | None = None

    def convert(self, message: Any) -> dict[str, Any]:
        """The policy's observation. Raises UserError if the message differs from the mapping's declarations."""
        if not isinstance(message, dict):
            raise UserError(f"expected an observation as a map, found {type(message).__name__}; send a map")
        observation: dict[str, Any] = {}
        for camera, spec in self.cameras:
            found = _get(message, camera.key)
            if found is not None:
                observation[f"image.{spec.name}"] = _check_picture(found, camera)
            elif not spec.optional:
                raise _missing(camera.key, message)
        if self.spec.state is not None:
            observation["state"] = self._state(message)
        if self.spec.prompt is not None:
            observation["instruction"] = self._instruction(message)
        if "noise" in message:
            observation["noise"] = _check_noise(message["noise"])
        return observation

    def _state(self, message: Mapping[str, Any]) -> NDArray[np.floating]:
        parts = []
        for key in self.mapping.state:
            found = _get(message, key)
            if found is None:
                raise _missing(key, message)
            try:
                part = np.atleast_1d(np.asarray(found))
            except ValueError:
                part = np.zeros(0, object)
            if part.dtype.kind != "f" or part.ndim != 1:
                raise UserError(
                    f"expected {_join(key)} as a row of floats, found {_describe_type(found)}; send floats (n,)"
                )
            parts.append(part)
        return np.concatenate(parts)

    def _instruction(self, message: Mapping[str, Any]) -> str:
        found = None if self.mapping.instruction is None else _get(message, self.mapping.instruction)
        if isinstance(found, str):
            return _check_text(found)
        if found is not None:
            raise UserError(f"expected an instruction as text, found {_describe_type(found)}; send text")
        if self.instruction is None:
            raise UserError(
                f"expected an instruction at {_join(self.mapping.instruction or ())}, found "
                f"{_describe_found(self.mapping.instruction or (), message)}; send one, or start the server with "
                "--instruction"
            )
        return self.instruction

    @property
    def description(self) -> list[str]:
        """What each key maps to, as text for the metadata and the console."""
        lines = [f"{_join(one.key)} ({one.layout}) -> camera {spec.name}" for one, spec in self.cameras]
        if self.spec.state is not None:
            keys = " + ".join(map(_join, self.mapping.state))
            lines.append(f"{keys} -> state {', '.join(self.spec.state.names)}")
        if self.spec.prompt is not None and self.mapping.instruction is not None:
            lines.append(f"{_join(self.mapping.instruction)} -> instruction")
        return lines


def load(name: str | Path, spec: PolicySpec, instruction: str | None = None, protocol: str = "openpi") -> Observations:
    """Load a mapping, by name or from a TOML file, for a policy. Raises UserError if it is invalid or does not fit."""
    mapping = own_mapping(spec, protocol) if name == OWN else read_mapping(name)
    wired = match_cameras(mapping, spec, name)
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


def _check_picture(found: Any, camera: Camera) -> NDArray[np.uint8]:
    """-> uint8 (H, W, 3)."""
    axis = 2 if camera.layout == "HWC" else 0
    if not isinstance(found, np.ndarray) or found.dtype != np.uint8 or found.ndim != 3 or found.shape[axis] != 3:
        form = "(height, width, 3)" if camera.layout == "HWC" else "(3, height, width)"
        raise UserError(
            f"expected {_join(camera.key)} as uint8 {form}, found {_describe_type(found)}; send this, or declare "
            "another layout"
        )
    return found if camera.layout == "HWC" else np.ascontiguousarray(found.transpose(1, 2, 0))


def _check_text(found: str) -> str:
    """JSON can contain lone surrogates, which tokenizers refuse; and megabytes would take a tokenizer seconds."""
    if len(found) > MAX_INSTRUCTION:
        raise UserError(
            f"expected an instruction of up to {MAX_INSTRUCTION} characters, found {len(found)}; shorten it"
        )
    try:
        found.encode()
    except UnicodeEncodeError:
        raise UserError("expected an instruction in Unicode, found lone surrogates; send valid text") from None
    return found


def _check_noise(found: Any) -> NDArray[np.floating]:
    """The policy checks the shape."""
    if not isinstance(found, np.ndarray) or found.dtype.kind != "f":
        raise UserError(f"expected noise as an array of floats, found {_describe_type(found)}; leave it out")
    return found


def _get(message: Mapping[str, Any], key: Key) -> Any:
    """The value at a key; None if there is none."""
    found: Any = message
    for part in key:
        found = found.get(part) if isinstance(found, dict) else None
    return found


def _missing(key: Key, message: Mapping[Any, Any]) -> UserError:
    return UserError(
        f"expected {_join(key)} in the observation, found {_describe_found(key, message)}; send it, or use another "
        "--mapping"
    )


def _describe_found(key: Key, message: Mapping[Any, Any]) -> str:
    """What a message has instead of the key."""
    found: Any = message
    for part in key:
        if not isinstance(found, dict) or part not in found:
            return list_names(_list_paths(message))
        found = found[part]
    return f"{describe_value(found)} there"


def _list_paths(message: Mapping[Any, Any]) -> list[str]:
    """All keys of a message; keys of nested maps follow their own: "images.front"."""
    paths = []
    for name, value in message.items():
        inner = [f"{name}.{key}" for key in value] if isinstance(value, dict) else []
        paths += inner or [str(name)]
    return sorted(paths)


def _join(key: Key) -> str:
    return ".".join(key)


def _describe_type(found: Any) -> str:
    return f"{found.dtype} {found.shape}" if isinstance(found, np.ndarray) else type(found).__name__
