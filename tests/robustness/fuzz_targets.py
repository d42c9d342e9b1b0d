"""The four servers in one process, without a network, for fuzz.py and tests.

    target = await Target.open("gr00t")
    refusal = await target.send(message)    # None: answered

    python tests/robustness/fuzz_targets.py gr00t 20000 runs/fuzz/gr00t/corpus  # sends its files in turn, prints growth

Session and inference process are those of `rlrc serve`. The policy preprocesses every observation but computes nothing,
so that a message reaches picture decoding, the tokenizer and the queue at no cost of inference.
"""

from __future__ import annotations

import asyncio
import base64
import io
import itertools
import json
import logging
import os
import pickle
import struct
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import fuzz_http
import msgpack
import numpy as np

from rlrc import artifact as artifacts
from rlrc.artifact import PolicySpec
from rlrc.errors import UserError
from rlrc.runtime.inference import preprocess
from rlrc.runtime.servers import observations
from rlrc.runtime.servers.gr00t import Gr00tServer
from rlrc.runtime.servers.key_mapping import OWN
from rlrc.runtime.servers.lerobot import LerobotServer
from rlrc.runtime.servers.lerobot_observations import BEGIN, END, MIDDLE, join_chunks
from rlrc.runtime.servers.observations import Observations
from rlrc.runtime.servers.openpi import OpenpiServer
from rlrc.runtime.servers.openvla import OpenvlaServer
from rlrc.runtime.servers.refusal import RequestRefused
from rlrc.runtime.servers.session import Session
from rlrc.runtime.wire import arrays, pickles, protobuf, zmtp
from rlrc.runtime.wire.ports import Access

HTTP = ("stop", "page")  # see fuzz_http.py
REFERENCE = Path(__file__).parents[2] / "reference/compressed"
PROTOCOLS = ("openpi", "openvla", "gr00t", "lerobot", *HTTP)
SIZE = 8  # pixels; a small picture makes mutations of other fields more likely
READY = b"\x04\x19\x05READY\x0bSocket-Type\x00\x00\x00\x03REQ"
CONNECTION = b"\xff"  # first byte of a message that is a whole GR00T connection; no msgpack map begins with it

# Kind of a message to LeRobot's server, by its first byte.
OBSERVED, INSTRUCTED, CHUNKS = b"o", b"i", b"c"


class IdlePolicy:
    """Preprocesses observations and returns zero actions."""

    def __init__(self, spec: PolicySpec, tokenizer: Path) -> None:
        assert spec.prompt is not None
        self.spec, self._tokenizer = spec, preprocess.Tokenizer(tokenizer, spec.prompt)

    def infer(self, observation: Mapping[str, Any]) -> dict[str, Any]:
        preprocess.check(observation, self.spec)
        preprocess.prepare(observation, self.spec, self._tokenizer)
        return {"actions": np.zeros((self.spec.action.horizon, self.spec.action.dim), np.float32)}

    def reset(self) -> None: ...


class Target:
    """The server and session of one protocol. Call ``close`` at the end."""

    def __init__(self, protocol: str, session: Session) -> None:
        self.protocol, self.session = protocol, session
        self._client = session.client()
        handlers = {"openpi": self._openpi, "openvla": self._openvla, "gr00t": self._gr00t, "lerobot": self._lerobot}
        self._handle: Callable[[bytes], Any] = handlers[protocol]
        name = "openvla-oft" if protocol == "openvla" else OWN
        mapping = observations.load(name, session.spec, None, protocol)
        servers: dict[str, Callable[[Session, Observations, Access], Any]] = {
            "openpi": OpenpiServer,
            "openvla": OpenvlaServer,
            "gr00t": Gr00tServer,
            "lerobot": LerobotServer,
        }
        self.server = servers[protocol](session, mapping, Access())
        self._port = 0

    @staticmethod
    async def open(protocol: str) -> Target | fuzz_http.StopTarget | fuzz_http.PageTarget:
        if protocol in HTTP:
            return fuzz_http.StopTarget() if protocol == "stop" else await fuzz_http.PageTarget.open()
        logging.getLogger("rlrc.runtime.servers").setLevel(logging.WARNING)  # no line for every refusal
        artifact = artifacts.load(REFERENCE, verify=())
        spec = artifact.manifest.policy
        spec = replace(spec, cameras=(replace(spec.cameras[0], width=SIZE, height=SIZE),))
        target = Target(protocol, Session(spec))
        await target.session.open(IdlePolicy, (spec, REFERENCE / "tokenizer/tokenizer.json"))
        if protocol == "gr00t":
            target._port = await target.server.start("127.0.0.1", 0)
        return target

    async def close(self) -> None:
        if self.protocol == "gr00t":
            await self.server.stop()
        self.session.close()

    async def send(self, message: bytes) -> str | None:
        """Returns why the message was refused, or None. Raises AssertionError for a finding."""
        try:
            refusal: str | None = await self._handle(message)
        except (RequestRefused, UserError) as error:
            refusal = str(error)
        if refusal is not None:
            assert refusal.startswith("expected "), refusal
            assert "\n" not in refusal, refusal
            assert "internal server error" not in refusal, refusal
            assert "Traceback" not in refusal, refusal
            refusal.encode()
        assert self.session.inference.failure is None, self.session.inference.failure
        assert not self.session.waiting
        assert not self.session.answering
        return refusal

    async def _openpi(self, message: bytes) -> None:
        with self.session.track(self.protocol):
            answer = await self.server._result(self._client, message, None)
            assert arrays.unpack(answer)["actions"].shape == (5, 4)

    async def _openvla(self, message: bytes) -> None:
        with self.session.track(self.protocol):
            json.loads(await self.server._answer(message))

    async def _gr00t(self, message: bytes) -> str | None:
        if message.startswith(CONNECTION):
            return await self._connect(message)
        answer = msgpack.unpackb(await self.server.answer(self._client, "fuzzer", message))
        error: str | None = answer.get("error") if isinstance(answer, dict) else None
        return error

    async def _connect(self, message: bytes) -> str | None:
        """Send through the port; the server must close the connection, even after an invalid message."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        try:
            writer.write(message)
            writer.write_eof()
            answer = await asyncio.wait_for(reader.read(), 2.0)
        except ConnectionError:  # the server closed the connection during the message
            answer = b""
        finally:
            writer.transport.abort()
        return None if len(answer) > len(zmtp.GREETING) + len(READY) else "expected a request, found none"

    async def _lerobot(self, message: bytes) -> None:
        kind, content = message[:1], message[1:]
        if kind == CHUNKS:
            content = await join_chunks(_chunks(content))
        await self.server.ready("fuzzer", b"")
        await self.server.instruct("fuzzer", content if kind == INSTRUCTED else _INSTRUCTION)
        if kind != INSTRUCTED:
            await self.server.observe("fuzzer", content)
            answer = protobuf.data(await self.server.actions("fuzzer", b""))
            assert answer.startswith(pickle.PROTO)


async def _chunks(content: bytes) -> AsyncIterator[bytes]:
    """Split the content into chunks, each after two bytes of length."""
    while content:
        size = int.from_bytes(content[:2], "big")
        yield content[2 : 2 + size]
        content = content[2 + size :]


def seeds(protocol: str) -> list[bytes]:
    """Valid messages in every form that the protocol accepts."""
    if protocol in HTTP:
        return fuzz_http.seeds(protocol)
    picture = np.arange(SIZE * SIZE * 3, dtype=np.uint8).reshape(SIZE, SIZE, 3)
    state, words = np.array([0.1, 0.6, 0.2, 0.5, 0, 0, 0], np.float32), "open the drawer"
    if protocol == "openpi":
        observation = {"image.corner4": picture, "state": state, "instruction": words}
        more = observation | {"noise": np.float32(1), "more": [1, None, True]}
        return [arrays.pack(observation), arrays.pack(more)]
    if protocol == "openvla":
        body = {"full_image": _json_numpy(picture), "state": _json_numpy(state), "instruction": words}
        listed = body | {"state": state.tolist(), "unnorm_key": "x"}
        return [json.dumps(one).encode() for one in (body, listed, {"encoded": json.dumps(body)})]
    return _gr00t_seeds(picture, state, words) if protocol == "gr00t" else _lerobot_seeds(picture, state, words)


def _json_numpy(array: np.ndarray) -> dict[str, Any]:
    return {"__numpy__": base64.b64encode(array.tobytes()).decode(), "dtype": array.dtype.str, "shape": array.shape}


def _gr00t_seeds(picture: np.ndarray, state: np.ndarray, words: str) -> list[bytes]:
    def packed(message: Any) -> bytes:
        def encoded(array: Any) -> dict[str, Any]:
            file = io.BytesIO()
            np.save(file, array)
            return {"__ndarray_class__": True, "as_npy": file.getvalue()}

        content: bytes = msgpack.packb(message, default=encoded)
        return content

    nested = {
        "video": {"corner4": picture[None, None]},
        "state": {"state": state[None, None]},
        "language": {"instruction": [[words]]},
    }
    flat = {"video.corner4": picture[None], "state.state": state[None].astype(np.float64), "instruction": [words]}
    text = flat | {"instruction": np.array([words]), "state.state": np.asfortranarray(state[None])}
    requests: list[Any] = [{"endpoint": "get_action", "data": {"observation": nested, "options": None}}]
    requests += [{"data": flat}, {"endpoint": "get_action", "data": text, "api_token": "t"}]
    requests += [{"endpoint": name} for name in ("ping", "kill", "get_modality_config")]
    requests += [{"endpoint": "reset", "data": {"options": None}}]
    bodies = [packed(request) for request in requests]
    handshake = zmtp.GREETING + READY
    connections = [handshake + b"\x01\0" + zmtp._encode_frame(0, bodies[index]) for index in (0, 3)]
    ping = handshake + b"\x04\x09\x04PING\0\0xy" + connections[1][len(handshake) :] * 2
    return [*bodies, *connections, ping]


class TimedObservation:
    """Pickled under the module name of LeRobot's class."""


class RemotePolicyConfig:
    """Pickled under the module name of LeRobot's class."""


def _lerobot_seeds(picture: np.ndarray, state: np.ndarray, words: str) -> list[bytes]:
    def pickled(kind: type, fields: dict[str, Any], protocol: int = 4) -> bytes:
        value = kind()
        value.__dict__.update(fields)
        here, there = (f"\x8c{len(name):c}{name}".encode("latin-1") for name in (__name__, HELPERS))
        content = pickle.dumps(value, protocol).replace(here, there)
        return content[:3] + struct.pack("<Q", len(content) - 11) + content[11:]  # the new length of its only frame

    names = [f"motor{index}.pos" for index in range(len(state))]
    raw = {**dict(zip(names, state.tolist(), strict=True)), "corner4": picture, "task": words}
    scalars = {**raw, "motor0.pos": state[0], "corner4": np.asfortranarray(picture)}
    timed = {"timestamp": 1.5, "timestep": 3, "must_go": True}
    observed = [
        pickled(TimedObservation, timed | {"observation": observation}, protocol)
        for observation in (raw, scalars)
        for protocol in (4, 5)
    ]
    config = {
        "lerobot_features": {
            "observation.state": {"dtype": "float32", "shape": (len(names),), "names": names},
            "observation.images.corner4": {"dtype": "image", "shape": (SIZE, SIZE, 3), "names": ["h", "w", "c"]},
        },
        "actions_per_chunk": 50,
        "policy_type": "act",
        "rename_map": {"a": "b"},
    }
    instruction = protobuf.with_data(pickled(RemotePolicyConfig, config))
    cut = [observed[0][start : start + 200] for start in range(0, len(observed[0]), 200)]
    chunks = b""
    for index, data in enumerate(cut):
        state_of = END if index == len(cut) - 1 else MIDDLE if index else BEGIN
        chunk = bytes((8, state_of, 0x12)) + protobuf.with_data(data)[1:]
        chunks += struct.pack(">H", len(chunk)) + chunk
    return [*(OBSERVED + one for one in observed), INSTRUCTED + instruction, CHUNKS + chunks]


def resident() -> int:
    """Resident memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def replay(protocol: str, number: int, folder: Path) -> int:
    """Send ``number`` messages, cycling through the folder. Returns the bytes of growth after the first tenth."""
    target, messages = await Target.open(protocol), [path.read_bytes() for path in sorted(folder.iterdir())]
    try:
        for index, message in zip(range(number), itertools.cycle(messages), strict=False):
            await target.send(message)
            if index == number // 10:
                before = resident()
        return resident() - before
    finally:
        await target.close()


HELPERS = pickles.LEROBOT[0]
_INSTRUCTION = next(seed for seed in seeds("lerobot") if seed.startswith(INSTRUCTED))[1:]

if __name__ == "__main__":
    print(asyncio.run(replay(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))))
