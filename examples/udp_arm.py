"""The counterpart of udp_robot.py: a simulated arm that follows commands, and holds when they stop arriving.

If the commanding program is killed, hangs or is disconnected, the arm stops after WATCHDOG_S. Every robot needs such a
watchdog in its own controller; no program at the other end of a cable can replace it.
"""

from __future__ import annotations

import argparse
import itertools
import socket
import struct
import time

import numpy as np
from udp_robot import COMMAND, HEAD, HELLO, PICTURE, PIECE, STATE, STOP, PeerClock

TICK_S, PICTURE_S = 0.01, 0.03  # intervals of states and images
WATCHDOG_S = 0.2
SPEED = 3.0  # maximal speed of a joint, rad/s
PAYLOAD = 1400  # bytes of an image per datagram, to avoid IP fragmentation


class Arm:
    def __init__(self, joints: int, size: int, port: int) -> None:
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind(("127.0.0.1", port))
        self.joints, self.target = np.zeros(joints), np.zeros(joints)
        self.peer: tuple[str, int] | None = None  # the commanding program
        self.clock, self.newest, self.heard = PeerClock(), 0, 0.0
        self.moving = False  # commands are arriving
        self._size, self._counter, self._random = size, itertools.count(1), np.random.default_rng(0)

    def receive(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self.socket.settimeout(left)
            try:
                datagram, peer = self.socket.recvfrom(2048)
                self.take(datagram, peer)
            except (TimeoutError, struct.error):
                continue

    def take(self, datagram: bytes, peer: tuple[str, int]) -> None:
        kind, count, theirs = HEAD.unpack_from(datagram)
        if kind == HELLO and peer != self.peer and not self.moving:  # not while another program commands
            print(f"hello from {peer[0]}:{peer[1]}", flush=True)
            self.peer, self.clock, self.newest = peer, PeerClock(), 0
        if peer != self.peer or count <= self.newest:
            return
        self.newest = count
        late = time.monotonic() - self.clock.ours(theirs) > WATCHDOG_S
        if kind == STOP:
            self.hold("stop requested")
            self.peer = None
        elif kind == COMMAND and not late:
            values = np.frombuffer(datagram, "<f4", offset=HEAD.size)
            if values.shape == self.target.shape and np.isfinite(values).all():
                self.target, self.heard, self.moving = values.astype(float), time.monotonic(), True

    def move(self) -> None:
        if self.moving and time.monotonic() - self.heard > WATCHDOG_S:
            self.hold(f"no command for {WATCHDOG_S} s")
        self.joints = self.joints + np.clip(self.target - self.joints, -SPEED * TICK_S, SPEED * TICK_S)

    def hold(self, reason: str) -> None:
        self.target, self.moving = self.joints, False
        print(f"held, {reason}: at {' '.join(f'{joint:.4f}' for joint in self.joints)}", flush=True)

    def send(self, kind: int, values: bytes, count: int) -> None:
        if self.peer is not None:
            self.socket.sendto(HEAD.pack(kind, count, time.monotonic()) + values, self.peer)

    def send_state(self) -> None:
        self.send(STATE, self.joints.astype("<f4").tobytes(), next(self._counter))

    def send_picture(self) -> None:
        """Send the only camera's image, which is noise."""
        pixels, count = self._random.bytes(self._size**2 * 3), next(self._counter)
        for place in range(0, len(pixels), PAYLOAD):
            piece = PIECE.pack(0, self._size, self._size, place) + pixels[place : place + PAYLOAD]
            self.send(PICTURE, piece, count)

    def run(self) -> None:
        pictured = 0.0
        while True:
            self.receive(TICK_S)
            self.move()
            self.send_state()
            if time.monotonic() - pictured >= PICTURE_S:
                pictured = time.monotonic()
                self.send_picture()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--joints", type=int, default=2)
    parser.add_argument("--size", type=int, default=32, help="pixels of a picture's side")
    parser.add_argument("--port", type=int, default=9870, help="on the loopback; 0 for any")
    options = parser.parse_args()
    arm = Arm(options.joints, options.size, options.port)
    print(f"an arm of {options.joints} joints listens on 127.0.0.1:{arm.socket.getsockname()[1]}", flush=True)
    arm.run()


if __name__ == "__main__":
    main()
