"""GR00T's protocol (ZeroMQ request-reply, msgpack) for the clients of N1.5, N1.6 and N1.7.

    {"endpoint": "get_action", "data": ..., "api_token": ...} -> the result, or {"error": text}

An array is {"__ndarray_class__": true, "as_npy": a .npy file}. Clients of N1.6 send {"observation", "options"} and get
[actions, information], with axes for robots and times: images (1, 1, H, W, 3), states (1, 1, D), actions (1, horizon,
D). Clients of N1.5 send only the observation and get only the actions, with the robots' axis if they sent one. Keys are
nested ("video", "front") or flat ("video.front"). The answer has the form of the request. "kill" is refused.
"""

from __future__ import annotations

import io
import json
import logging
import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from rlrc.errors import UserError
from rlrc.runtime.servers.key_mapping import Columns
from rlrc.runtime.servers.observations import Observations
from rlrc.runtime.servers.quoting import describe_value, escape_name, list_names
from rlrc.runtime.servers.refusal import RequestRefused
from rlrc.runtime.servers.session import Client, Session
from rlrc.runtime.wire import arrays
from rlrc.runtime.wire.arrays import DTYPE, MAX_DIMENSIONS
from rlrc.runtime.wire.logs import fields
from rlrc.runtime.wire.ports import CLIENTS, LARGEST, Access, release_frames
from rlrc.runtime.wire.zmtp import Answer, Replier

PROTOCOL = "gr00t"
MODALITIES = ("video", "state", "language")
ENDPOINTS = ("get_action", "reset", "get_modality_config", "ping")
ADVICE = "send what GR00T's client does"

# A .npy file of version 1.0, as numpy writes it: numpy's own reader would allocate what the header declares.
NPY = re.compile(
    rb"\x93NUMPY\x01\x00(..)\{'descr': '([^']{2,8})', 'fortran_order': (False|True), 'shape': \(([0-9, ]*)\), \} *\n",
    re.DOTALL,
)
TEXT = re.compile(r"[<>=|]U[1-9][0-9]{0,3}")

log = logging.getLogger(__name__)


class Gr00tServer:
    """Listens on one port. Call ``start``, and ``stop`` after the session has been drained.

    An episode begins with a connection and with "reset". Raises UserError if the mapping's keys are not GR00T's.
    """

    def __init__(self, session: Session, observations: Observations, access: Access) -> None:
        mapping = observations.mapping
        keys = [("video", camera.key) for camera in mapping.cameras] + [("state", key) for key in mapping.state]
        keys += [] if mapping.instruction is None else [("language", mapping.instruction)]
        for modality, key in keys:
            if len(key) != 2 or key[0] != modality:
                raise UserError(
                    f'expected keys such as ["{modality}", "x"] in a mapping for gr00t, found {list(key)}; use own or '
                    "another --mapping"
                )
        self._session, self._observations, self._access = session, observations, access
        whole = (Columns("action", session.spec.action.dim),)
        self._columns = observations.mapping.actions or whole
        self._replier = Replier(self._handler, LARGEST, CLIENTS)

    async def start(self, host: str, port: int) -> int:
        """Returns the port. Raises UserError if it is taken."""
        return await self._replier.start(host, port)

    async def stop(self) -> None:
        await self._replier.stop()

    def _handler(self, peer: str, connected: Callable[[], bool]) -> Answer:
        return partial(self.answer, self._session.client(), peer, connected=connected)

    async def answer(
        self, client: Client, peer: str, request: bytes | UserError, connected: Callable[[], bool] = lambda: True
    ) -> bytes:
        """Answers every request; errors are answers too."""
        try:
            if isinstance(request, UserError):
                raise request
            return _pack(await self._handle(client, request, connected))
        except (RequestRefused, UserError) as error:
            outcome = error.kind if isinstance(error, RequestRefused) else "request"
            log.info("gr00t client %s: %s", peer, error, extra=fields(protocol=PROTOCOL, client=peer, outcome=outcome))
            release_frames(error)
            return _pack({"error": str(error)})
        except Exception:
            log.exception("gr00t client %s", peer, extra=fields(protocol=PROTOCOL, client=peer, outcome="fault"))
            return _pack({"error": "internal server error; see the server's log"})

    async def _handle(self, client: Client, message: bytes, connected: Callable[[], bool]) -> Any:
        request = arrays.unpack(message, _decode_map, ADVICE)
        if not isinstance(request, dict):
            raise UserError(f"expected a request as a map, found {type(request).__name__}; {ADVICE}")
        token = request.get("api_token")
        if not self._access.allows(f"Bearer {token}" if isinstance(token, str) else None):
            raise UserError("expected the server's api_token, found another or none; give it to the client")
        endpoint = request.get("endpoint", "get_action")
        if not isinstance(endpoint, str) or endpoint not in ENDPOINTS:
            raise UserError(
                f"expected the endpoint {', '.join(ENDPOINTS[:-1])} or {ENDPOINTS[-1]}, found "
                f"{describe_value(endpoint)}; use one of these (clients cannot stop a server)"
            )
        if endpoint == "get_action":
            with self._session.track(PROTOCOL):
                return await self._actions(client, request.get("data"), connected)
        if endpoint == "reset":
            client.reset()
            return {}
        if endpoint == "get_modality_config":
            return self._modalities()
        return {"status": "ok", "message": "Server is running"}

    async def _actions(self, client: Client, data: Any, connected: Callable[[], bool]) -> Any:
        newer = isinstance(data, dict) and "observation" in data
        found = data["observation"] if newer else data
        if not isinstance(found, dict):
            raise UserError(f"expected an observation as a map, found {type(found).__name__}; {ADVICE}")
        nested = any(modality in found for modality in MODALITIES)
        message, batched = _drop_axes(found if nested else _nest(found))
        if newer and not batched:
            raise UserError(f"expected axes for robots and times, found one axis; {ADVICE}, or data as N1.5's")
        self._check_cameras(message["video"])
        chunk = await client.infer(self._observations.convert(message), connected)
        rows = chunk.actions[None] if batched else chunk.actions  # (1, horizon, dim) or (horizon, dim)
        ends = np.cumsum([columns.size for columns in self._columns])
        parts = zip(self._columns, np.split(rows, ends[:-1], axis=-1), strict=True)
        actions = {(columns.key if nested else f"action.{columns.key}"): part for columns, part in parts}
        return [actions, {}] if newer else actions

    def _check_cameras(self, video: Mapping[Any, Any]) -> None:
        """Raises UserError if an optional camera is missing and an unknown one is there: probably a wrong name."""
        keys = {camera.key[1]: spec for camera, spec in self._observations.cameras}
        strange = sorted(str(name) for name in video.keys() - keys.keys())
        if strange and (lacking := [key for key, spec in keys.items() if spec.optional and key not in video]):
            raise UserError(
                f"expected the cameras {list_names(keys)} in video, found {list_names(strange)} and no "
                f"{list_names(lacking)}; rename it, or leave it out"
            )

    def _modalities(self) -> dict[str, Any]:
        """What clients may send and receive, as GR00T's ModalityConfig."""
        mapping, spec = self._observations.mapping, self._session.spec
        keys = {
            "video": [camera.key[1] for camera, _ in self._observations.cameras],
            "state": [] if spec.state is None else [key[1] for key in mapping.state],
            "action": [columns.key for columns in self._columns],
            "language": [] if mapping.instruction is None else [mapping.instruction[1]],
        }
        flat = mapping.generation == "N1.5"
        configured = {}
        for modality, names in keys.items():
            times = list(range(spec.action.horizon)) if modality == "action" else [0]
            named = [f"{modality}.{name}" for name in names] if flat and modality != "language" else names
            config = {"delta_indices": times, "modality_keys": named}
            if names:  # GR00T's class takes no empty list
                as_json = json.dumps(config) if flat else config
                configured[modality] = {"__ModalityConfig_class__": True, "as_json": as_json}
        return configured


def _nest(flat: Mapping[Any, Any]) -> dict[str, dict[str, Any]]:
    """{"video.front": ...} -> {"video": {"front": ...}}. Other keys than video and state go to "language"."""
    message: dict[str, dict[str, Any]] = {modality: {} for modality in MODALITIES}
    for key, value in flat.items():
        modality, dot, name = str(key).partition(".")
        if dot and modality in ("video", "state"):
            message[modality][name] = value
        else:
            message["language"][str(key)] = value
    return message


def _drop_axes(observation: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """Remove the axes for robots and times; also returns whether there was one for robots.

    Raises UserError for more than one robot or time, and if arrays differ in these axes.
    """
    message: dict[str, Any] = {}
    axes = set()
    for modality, rank in (("video", 3), ("state", 1)):
        values = observation.get(modality, {})
        if not isinstance(values, dict):
            raise UserError(f"expected {modality} as a map, found {type(values).__name__}; {ADVICE}")
        message[modality] = {}
        for name, value in values.items():
            message[modality][name], number = _drop_leading_axes(value, rank, f"{modality}.{escape_name(name)}")
            axes.add(number)
    if len(axes) > 1:
        raise UserError(f"expected the same axes for robots and times everywhere, found different ones; {ADVICE}")
    language = observation.get("language", {})
    if not isinstance(language, dict):
        raise UserError(f"expected language as a map, found {type(language).__name__}; {ADVICE}")
    message["language"] = {name: _unwrap_text(value) for name, value in language.items()}
    return message, axes == {2}


def _drop_leading_axes(value: Any, rank: int, what: str) -> tuple[Any, int]:
    if not isinstance(value, np.ndarray):
        raise UserError(f"expected {what} as an array, found {describe_value(value)}; send what was measured")
    number = value.ndim - rank
    if number not in (1, 2) or any(size != 1 for size in value.shape[:number]):
        raise UserError(
            f"expected {what} of one robot at one time, ([1,] 1, {'height, width, 3' if rank == 3 else 'size'}), found "
            f"{value.shape}; send the newest alone"
        )
    return value.reshape(value.shape[number:]), number


def _unwrap_text(value: Any) -> Any:
    """The text in nested lists for robots and times."""
    while isinstance(value, list) and len(value) == 1:
        value = value[0]
    return value


def _pack(answer: Any) -> bytes:
    return arrays.pack(_encode(answer))


def _encode(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        file = io.BytesIO()
        np.save(file, value, allow_pickle=False)
        return {"__ndarray_class__": True, "as_npy": file.getvalue()}
    if isinstance(value, dict):
        return {key: _encode(item) for key, item in value.items()}
    return [_encode(item) for item in value] if isinstance(value, list) else value


def _decode_map(values: dict[Any, Any]) -> Any:
    if "__ndarray_class__" in values:
        return _decode_npy(values.get("as_npy"))
    if b"__ndarray__" in values or b"nd" in values:
        raise UserError(f"expected GR00T's encoding of arrays, found another's; {ADVICE}")
    return values


def _decode_npy(file: Any) -> Any:
    """The array in a .npy file, or the one text in it."""
    header = NPY.match(file) if isinstance(file, bytes) else None
    if header is None or 10 + int.from_bytes(header[1], "little") != header.end():
        raise UserError(f"expected an array as a .npy file of version 1.0, found another; {ADVICE}")
    kind, sizes = header[2].decode("latin-1"), [size for size in header[4].decode().split(",") if size.strip()]
    text = TEXT.fullmatch(kind) is not None
    if not text and not DTYPE.fullmatch(kind):
        raise UserError(f"expected an array of numbers, found dtype {kind!r}; send floats or integers")
    if len(sizes) > MAX_DIMENSIONS or not all(len(size.strip()) < 20 and size.strip().isdigit() for size in sizes):
        raise UserError(f"expected an array's shape as up to {MAX_DIMENSIONS} sizes, found another; {ADVICE}")
    shape, dtype, raw = tuple(map(int, sizes)), np.dtype(kind), memoryview(file)[header.end() :]
    if (size := math.prod(shape) * dtype.itemsize) != len(raw):
        raise UserError(f"expected {size} bytes for {kind} {shape}, found {len(raw)}; {ADVICE}")
    if text:
        return _decode_text(raw.tobytes(), math.prod(shape), kind)
    return np.frombuffer(raw, dtype).reshape(shape, order="F" if header[3] == b"True" else "C")


def _decode_text(raw: bytes, number: int, kind: str) -> str:
    """Decoded here, since numpy accepts invalid Unicode."""
    if number != 1:
        raise UserError(f"expected one text, found {number}; send the instruction alone")
    try:
        return raw.decode("utf-32-be" if kind[0] == ">" else "utf-32-le").rstrip("\0")
    except UnicodeDecodeError:
        raise UserError(f"expected text in Unicode, found invalid characters; {ADVICE}") from None
