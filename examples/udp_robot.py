"""A robot over UDP, as a driver for ``rlrc run``; udp_arm.py is its counterpart.

    python udp_arm.py &
    rlrc run ART --driver udp_robot:open_robot --profile udp_arm.toml --hz 20

A datagram contains its kind, a counter, the sender's clock in seconds (little-endian), and:

    HELLO, STOP   to the arm     nothing
    COMMAND       to the arm     float32 for every dimension of the action
    STATE         from the arm   float32 for every entry of the state
    PICTURE       from the arm   camera, height, width, offset of this piece in the image's bytes; then the bytes

UDP loses, repeats and reorders datagrams. Those that are not newer than the last of their kind are dropped, and an
image is complete once all its pieces have arrived. Nothing is resent, since newer data follow. Anyone who can send to
the port can move the arm: use a separate network.
"""

from __future__ import annotations

import itertools
import math
import os
import socket
import struct
import threading
import time
from contextlib import suppress
from typing import Any

import numpy as np

from rlrc.artifact import PolicySpec
from rlrc.errors import UserError
from rlrc.robots.robot import RobotError, Sensed

ADDRESS = os.environ.get("UDP_ARM", "127.0.0.1:9870")
HELLO, STOP, COMMAND, STATE, PICTURE = range(5)
HEAD, PIECE = struct.Struct("<BId"), struct.Struct("<BHHI")
DRIFT = 1e-4  # drift between two clocks, seconds per second
OPENING_S = 5.0


class PeerClock:
    """Converts the peer's clock to ours: the datagram with the smallest delay gives the offset."""

    def __init__(self) -> None:
        self._apart, self._last = math.inf, 0.0

    def ours(self, theirs: float) -> float:
        now = time.monotonic()
        self._apart = min(self._apart + DRIFT * (now - self._last), now - theirs)
        self._last = now
        return theirs + self._apart


class UdpRobot:
    live_pictures = True  # a real camera never sends identical images

    def __init__(self, spec: PolicySpec, instruction: str, address: tuple[str, int]) -> None:
        self._spec, self._instruction = spec, instruction
        self._names = () if spec.state is None else spec.state.names
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.connect(address)  # receive from this address only
        self._socket.settimeout(0.1)
        self._counter, self._clock = itertools.count(1), PeerClock()
        self._state: tuple[np.ndarray, float] | None = None
        self._pictures: dict[str, tuple[np.ndarray, float]] = {}
        self._newest: dict[Any, int] = {}
        self._pieces: dict[int, dict[int, bytes]] = {}
        self._heard, self._gone, self._closed = "nothing", False, False
        self._thread = threading.Thread(target=self._receive, daemon=True)
        self._thread.start()

    def wait(self, seconds: float) -> None:
        """Wait for the first state and images; ``rlrc run`` warms up with them."""
        deadline = time.monotonic() + seconds
        while self._state is None or len(self._pictures) < len(self._spec.cameras):
            if time.monotonic() > deadline:
                wanted = f"a state of {len(self._names)} entries and {len(self._spec.cameras)} pictures"
                raise UserError(
                    f"expected {wanted} from {ADDRESS}, found {self._heard} and {len(self._pictures)} pictures; start "
                    "udp_arm.py with matching --joints"
                )
            with suppress(OSError):  # not listening yet
                self._send(HELLO)
            time.sleep(0.1)

    def sense(self) -> Sensed | None:
        """The newest data; the loop checks their age by the time stamps."""
        if self._gone:
            raise RobotError("no program listens on the arm's port any more")
        if self._state is None:
            return None
        (state, stamp), pictures = self._state, dict(self._pictures)
        observation: dict[str, Any] = {name: picture for name, (picture, _) in pictures.items()}
        observation |= {"state": state, "instruction": self._instruction}
        return Sensed(observation, state, stamp, {name: at for name, (_, at) in pictures.items()})

    def command(self, action: np.ndarray) -> None:
        try:
            self._send(COMMAND, action.astype("<f4").tobytes())
        except OSError as error:
            raise RobotError(f"the arm cannot be reached: {error.strerror}") from None

    def stop(self) -> None:
        with suppress(OSError):  # if this fails, the arm's watchdog stops it
            self._send(STOP)

    def close(self) -> None:
        self.stop()
        self._closed = True
        self._thread.join()
        self._socket.close()

    def _send(self, kind: int, values: bytes = b"") -> None:
        head = HEAD.pack(kind, next(self._counter), time.monotonic())
        self._socket.send(head + values, socket.MSG_DONTWAIT)

    def _receive(self) -> None:
        while not self._closed:
            try:
                datagram = self._socket.recv(65536)
            except TimeoutError:
                continue
            except OSError:  # ICMP: the port is closed
                self._gone = self._state is not None
                continue
            with suppress(struct.error, ValueError, LookupError):  # not a datagram of the arm
                self._take(datagram)

    def _take(self, datagram: bytes) -> None:
        kind, count, theirs = HEAD.unpack_from(datagram)
        stamp, values = self._clock.ours(theirs), datagram[HEAD.size :]
        if kind == STATE and count > self._newest.get(STATE, 0):
            state = np.frombuffer(values, "<f4")
            self._newest[STATE], self._heard = count, f"a state of {len(state)} entries"
            if len(state) == len(self._names):
                self._state = (state, stamp)
        if kind == PICTURE:
            self._take_piece(count, stamp, values)

    def _take_piece(self, count: int, stamp: float, values: bytes) -> None:
        camera, height, width, place = PIECE.unpack_from(values)
        if count < self._newest.get((PICTURE, camera), 0):
            return
        if count > self._newest.get((PICTURE, camera), 0):
            self._newest[PICTURE, camera], self._pieces[camera] = count, {}
        pieces = self._pieces[camera]
        pieces[place] = values[PIECE.size :]
        if sum(map(len, pieces.values())) == height * width * 3:
            pixels = b"".join(pieces[place] for place in sorted(pieces))
            picture = np.frombuffer(pixels, np.uint8).reshape(height, width, 3)
            self._pictures[f"image.{self._spec.cameras[camera].name}"] = (picture, stamp)


def open_robot(spec: PolicySpec, instruction: str) -> UdpRobot:
    """Called by ``--driver udp_robot:open_robot``."""
    host, _, port = ADDRESS.rpartition(":")
    if not port.isdigit():
        raise UserError(f"expected HOST:PORT in UDP_ARM, found {ADDRESS!r}; correct it")
    robot = UdpRobot(spec, instruction, (host, int(port)))
    try:
        robot.wait(OPENING_S)
    except BaseException:
        robot.close()
        raise
    return robot
