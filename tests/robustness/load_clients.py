"""The honest clients of load.py, one per thread, and a monitor of the server's memory."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import random
import re
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import msgpack
import numpy as np
import zmq

from rlrc.artifact import PolicySpec
from rlrc.runtime.inference.decode import NoAction
from rlrc.runtime.servers.client import RemotePolicy

TIMEOUT_S = 10.0
Ask = Callable[[], str | None]
"""Sends one observation. Returns why there is no action, or None if there is one."""


@dataclass
class Client:
    """An honest client: milliseconds of the answered calls and reasons of the refused ones."""

    protocol: str
    milliseconds: list[float] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    skipped: int = 0  # periods that passed while the client waited for an answer

    def run(self, port: int, observation: Mapping[str, Any], period_s: float, seconds: float, seed: int) -> None:
        """Send one observation per period, at a random time, since robots are not synchronised."""
        chance = random.Random(seed)
        with OPEN[self.protocol](port, observation) as ask:
            for _ in range(3):  # warm-up
                ask()
            begun, turn = time.perf_counter(), 0
            while turn * period_s < seconds:
                moment = begun + (turn + chance.random()) * period_s
                time.sleep(max(0.0, moment - time.perf_counter()))
                asked = time.perf_counter()
                refusal = ask()
                answered = time.perf_counter()
                if refusal is None:
                    self.milliseconds.append((answered - asked) * 1e3)
                else:
                    self.refused[refusal[:120]] += 1
                passed = int((answered - begun) / period_s)
                self.skipped += max(0, passed - turn - 1)
                turn = max(turn + 1, passed)


@contextmanager
def openpi(port: int, observation: Mapping[str, Any]) -> Iterator[Ask]:
    with RemotePolicy(f"ws://127.0.0.1:{port}", timeout_s=TIMEOUT_S) as policy:

        def ask() -> str | None:
            try:
                policy.infer(observation)
            except NoAction as error:
                return str(error)
            return None

        yield ask


@contextmanager
def openvla(port: int, observation: Mapping[str, Any]) -> Iterator[Ask]:
    """OpenVLA-OFT's protocol: a persistent connection, JSON with arrays of json_numpy."""

    def encoded(array: np.ndarray) -> dict[str, Any]:
        return {"__numpy__": base64.b64encode(array.tobytes()).decode(), "dtype": array.dtype.str, "shape": array.shape}

    picture = next(value for name, value in observation.items() if name.startswith("image."))
    message = {"full_image": encoded(picture), "instruction": observation.get("instruction", "")}
    message |= {"state": encoded(observation["state"])} if "state" in observation else {}
    body = json.dumps(message).encode()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)

    def ask() -> str | None:
        try:
            connection.request("POST", "/act", body, {"Content-Type": "application/json"})
            with connection.getresponse() as response:
                reply = json.loads(response.read())
        except (OSError, http.client.HTTPException, ValueError) as error:
            connection.close()  # the next call reconnects
            return type(error).__name__
        return None if isinstance(reply, list) else response.headers.get("X-Error", "error")

    try:
        yield ask
    finally:
        connection.close()


@contextmanager
def gr00t(port: int, observation: Mapping[str, Any]) -> Iterator[Ask]:
    """The protocol of GR00T N1.6, with the policy's names of cameras and state."""

    def encoded(array: np.ndarray) -> dict[str, Any]:
        file = io.BytesIO()
        np.save(file, array)
        return {"__ndarray_class__": True, "as_npy": file.getvalue()}

    pictures = {name.removeprefix("image."): value for name, value in observation.items() if name.startswith("image.")}
    data: dict[str, Any] = {"video": {name: encoded(value[None, None]) for name, value in pictures.items()}}
    data["language"] = {"instruction": [[observation.get("instruction", "")]]}
    data |= {"state": {"state": encoded(observation["state"][None, None])}} if "state" in observation else {}
    request = msgpack.packb({"endpoint": "get_action", "data": {"observation": data, "options": None}})
    with zmq.Context() as context, context.socket(zmq.REQ) as socket:
        for option, value in ((zmq.LINGER, 0), (zmq.RCVTIMEO, int(TIMEOUT_S * 1e3)), (zmq.REQ_RELAXED, 1)):
            socket.setsockopt(option, value)
        socket.connect(f"tcp://127.0.0.1:{port}")

        def ask() -> str | None:
            socket.send(request)
            try:
                reply = msgpack.unpackb(socket.recv())
            except zmq.Again:
                return "timeout"
            return None if isinstance(reply, list) else str(reply["error"])

        yield ask


@contextmanager
def lerobot(port: int, observation: Mapping[str, Any]) -> Iterator[Ask]:
    """LeRobot's protocol; checks readiness only, since its clients receive actions asynchronously."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        ready = channel.unary_unary("/transport.AsyncInference/Ready")

        def ask() -> str | None:
            try:
                ready(b"", timeout=TIMEOUT_S)
            except grpc.RpcError as error:
                return str(error.code())
            return None

        yield ask


OPEN = {"openpi": openpi, "openvla": openvla, "gr00t": gr00t, "lerobot": lerobot}


def make_observation(spec: PolicySpec) -> dict[str, Any]:
    """Pictures of noise, the center of the state range, and an instruction, as the policy requires."""
    random = np.random.default_rng(0)
    observation: dict[str, Any] = {
        f"image.{camera.name}": random.integers(0, 256, (camera.height, camera.width, 3), np.uint8)
        for camera in spec.cameras
    }
    if spec.state is not None:
        observation["state"] = np.array(spec.state.norm.center, np.float32)
    if spec.prompt is not None:
        observation["instruction"] = "open the drawer"
    return observation


def once(protocol: str, port: int, observation: Mapping[str, Any]) -> str | None:
    """Send one observation as a new client. Returns why there is no action, or None."""
    try:
        with OPEN[protocol](port, observation) as ask:
            return ask()
    except Exception as error:  # any error is a failure for the new client
        return str(error)[:120]


class Monitor:
    """Every ``EVERY_S`` seconds, samples the server's memory and open files and sends an observation as a new client.

    ``newcomers`` counts the answers to new clients.
    """

    EVERY_S = 5.0

    def __init__(self, pid: int, port: int, observation: Mapping[str, Any]) -> None:
        self._pid, self._port, self._observation = pid, port, observation
        self.samples: list[dict[str, float]] = []
        self.newcomers: Counter[str] = Counter()
        self._ending, self._begun = threading.Event(), time.monotonic()
        self._thread = threading.Thread(target=self._sample)

    def __enter__(self) -> Monitor:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join()

    def _sample(self) -> None:
        while True:
            server, worker = resident(self._pid), sum(map(resident, children(self._pid)))
            files = len(os.listdir(f"/proc/{self._pid}/fd"))
            seconds = round(time.monotonic() - self._begun, 1)
            self.samples.append({"seconds": seconds, "server_mb": server, "inference_mb": worker, "files": files})
            self.newcomers[once("openpi", self._port, self._observation) or "answered"] += 1
            if self._ending.wait(self.EVERY_S):
                return


def resident(pid: int) -> float:
    """Resident memory of a process in megabytes; zero after it has exited."""
    with suppress(OSError):
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)
    return 0.0


def children(pid: int) -> list[int]:
    files = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for file in files for child in file.read_text().split()]


def inference_seconds(port: int) -> float:
    """Total seconds of inference so far, from /metrics."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=TIMEOUT_S) as response:
        total = re.search(r"rlrc_inference_seconds_sum (\S+)", response.read().decode())
    return float(total[1]) if total else 0.0
