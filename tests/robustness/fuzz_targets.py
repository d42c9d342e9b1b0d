"""The four servers in one process, for fuzz.py and for tests: messages reach them without a network.

    target = await Target.open("gr00t")
    told = await target.give(message)    # None: answered; else why not

    python tests/robustness/fuzz_targets.py gr00t 20000 runs/fuzz/gr00t/corpus  # gives its files in turn, prints growth

Session and inference process are those of `rlrc serve`. Behind them is a policy that prepares every observation as any
does, and then stands still: so a message reaches the pictures, the tokenizer and the queue, and costs no inference.
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
SIZE = 8  # pixels, so that mutations seldom fall into the picture
READY = b"\x04\x19\x05READY\x0bSocket-Type\x00\x00\x00\x03REQ"
CONNECTION = b"\xff"  # a message that begins so is a whole connection of GR00T's; no msgpack map does

# What a message to LeRobot's server is, by its first byte.
OBSERVED, INSTRUCTED, CHUNKS = b"o", b"i", b"c"


class Still:
    """Takes what a policy takes, and does not move."""

    def __init__(self, spec: PolicySpec, tokenizer: Path) -> None:
        assert spec.prompt is not None
        self.spec, self._tokenizer = spec, preprocess.Tokenizer(tokenizer, spec.prompt)

    def infer(self, observation: Mapping[str, Any]) -> dict[str, Any]:
        preprocess.check(observation, self.spec)
        preprocess.prepare(observation, self.spec, self._tokenizer)
        return {"actions": np.zeros((self.spec.action.horizon, self.spec.action.dim), np.float32)}

    def reset(self) -> None: ...


class Target:
    """One protocol's server and its session. ``close`` at the end."""

    def __init__(self, protocol: str, session: Session) -> None:
        self.protocol, self.session = protocol, session
        self._client = session.client()
        give = {"openpi": self._openpi, "openvla": self._openvla, "gr00t": self._gr00t, "lerobot": self._lerobot}
        self._give: Callable[[bytes], Any] = give[protocol]
        name = "openvla-oft" if protocol == "openvla" else OWN
        mapped = observations.load(name, session.spec, None, protocol)
        kinds: dict[str, Callable[[Session, Observations, Access], Any]] = {
            "openpi": OpenpiServer,
            "openvla": OpenvlaServer,
            "gr00t": Gr00tServer,
            "lerobot": LerobotServer,
        }
        self.server = kinds[protocol](session, mapped, Access())
        self._port = 0

    @staticmethod
    async def open(protocol: str) -> Target | fuzz_http.StopTarget | fuzz_http.PageTarget:
        if protocol in HTTP:
            return fuzz_http.StopTarget() if protocol == "stop" else await fuzz_http.PageTarget.open()
        logging.getLogger("rlrc.runtime.servers").setLevel(logging.WARNING)  # a line for every refusal is too much
        artifact = artifacts.load(REFERENCE, verify=())
        spec = artifact.manifest.policy
        spec = replace(spec, cameras=(replace(spec.cameras[0], width=SIZE, height=SIZE),))
        target = Target(protocol, Session(spec))
        await target.session.open(Still, (spec, REFERENCE / "tokenizer/tokenizer.json"))
        if protocol == "gr00t":
            target._port = await target.server.start("127.0.0.1", 0)
        return target

    async def close(self) -> None:
        if self.protocol == "gr00t":
            await self.server.stop()
        self.session.close()

    async def give(self, message: bytes) -> str | None:
        """Raises AssertionError where the server did what it should not."""
        try:
            told = await self._give(message)
        except (RequestRefused, UserError) as error:
            told = str(error)
        if told is not None:
            assert told.startswith("expected "), told
            assert "\n" not in told, told
            assert "internal server error" not in told, told
            assert "Traceback" not in told, told
            told.encode()
        assert self.session.inference.failure is None, self.session.inference.failure
        assert not self.session.waiting
        assert not self.session.answering
        return told

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
        return answer.get("error") if isinstance(answer, dict) else None

    async def _connect(self, message: bytes) -> str | None:
        """Through the port: the server has to end the connection, whatever came."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        try:
            writer.write(message)
            writer.write_eof()
            answer = await asyncio.wait_for(reader.read(), 2.0)
        except ConnectionError:  # it hung up while we spoke
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
    """Messages with two bytes of their length before them."""
    while content:
        size = int.from_bytes(content[:2], "big")
        yield content[2 : 2 + size]
        content = content[2 + size :]


def seeds(protocol: str) -> list[bytes]:
    """Valid messages of every form that the protocol has."""
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

        found: bytes = msgpack.packb(message, default=encoded)
        return found

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
    hello = zmtp.GREETING + READY
    connections = [hello + b"\x01\0" + zmtp._encode_frame(0, bodies[index]) for index in (0, 3)]
    ping = hello + b"\x04\x09\x04PING\0\0xy" + connections[1][len(hello) :] * 2
    return [*bodies, *connections, ping]


class TimedObservation:
    """Pickled as if it were LeRobot's."""


class RemotePolicyConfig:
    """Likewise."""


def _lerobot_seeds(picture: np.ndarray, state: np.ndarray, words: str) -> list[bytes]:
    def pickled(kind: type, fields: dict[str, Any], protocol: int = 4) -> bytes:
        made = kind()
        made.__dict__.update(fields)
        here, there = (f"\x8c{len(name):c}{name}".encode("latin-1") for name in (__name__, HELPERS))
        found = pickle.dumps(made, protocol).replace(here, there)
        return found[:3] + struct.pack("<Q", len(found) - 11) + found[11:]  # its one frame is longer now

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
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def replay(protocol: str, number: int, folder: Path) -> int:
    """Gives the server that many messages, the folder's in turn. -> bytes that it took more after the first tenth."""
    target, messages = await Target.open(protocol), [path.read_bytes() for path in sorted(folder.iterdir())]
    try:
        for index, message in zip(range(number), itertools.cycle(messages), strict=False):
            await target.give(message)
            if index == number // 10:
                before = resident()
        return resident() - before
    finally:
        await target.close()


HELPERS = pickles.LEROBOT[0]
_INSTRUCTION = next(seed for seed in seeds("lerobot") if seed.startswith(INSTRUCTED))[1:]

if __name__ == "__main__":
    print(asyncio.run(replay(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))))
