"""Records every step of a robot as a frame of a LeRobotDataset v3.0.

While the loop runs, a thread writes the frames into one growing file, so that the loop only copies them; at the end the
data set is made from that file. A disk that is full or too slow stops the robot, like a robot that does not answer.
"""

from __future__ import annotations

import io
import queue
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlrc.artifact import PolicySpec
from rlrc.errors import UserError
from rlrc.folders import check_output
from rlrc.robots.driver import describe_exception
from rlrc.robots.robot import Robot, RobotError, Sensed

WAITING = 256  # frames that may wait for the disk


class Recorder:
    """A robot that wraps another. ``hz``: rate of the commands. Raises UserError if ``out`` cannot be written."""

    def __init__(self, robot: Robot, spec: PolicySpec, hz: float, out: Path) -> None:
        check_output(out)
        self._robot, self._spec, self._hz, self._out = robot, spec, hz, out
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        self._folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.frames-", dir=out.absolute().parent))
        self._frames: queue.Queue[dict[str, NDArray[Any]] | None] = queue.Queue(WAITING)
        self._failure: str | None = None
        self._episodes: list[tuple[str, int]] = []  # task, frames
        self._sensed: Sensed | None = None
        self._stream = (self._folder / "frames").open("wb", buffering=0)  # so that a failure shows at once
        self._thread = threading.Thread(target=self._write, name="recorder", daemon=True)
        self._thread.start()

    @property
    def live_pictures(self) -> bool:
        return self._robot.live_pictures

    def begin(self, task: str) -> None:
        """Begins a new episode, with this task in words."""
        self._episodes.append((task, 0))

    def sense(self) -> Sensed | None:
        if self._failure is not None:  # before another command is sent
            raise RobotError(self._failure)
        self._sensed = self._robot.sense()
        return self._sensed

    def command(self, action: NDArray[Any]) -> None:
        self._robot.command(action)
        if self._sensed is None or not self._episodes:
            return
        if self._failure is not None:
            raise RobotError(self._failure)
        kept = {name: np.array(value) for name, value in self._sensed.observation.items() if name != "instruction"}
        try:
            self._frames.put_nowait({**kept, "action": np.array(action, np.float32)})
        except queue.Full:
            self._failure = f"the recording is {WAITING} frames behind: the disk is too slow"
            raise RobotError(self._failure) from None
        task, frames = self._episodes[-1]
        self._episodes[-1] = (task, frames + 1)

    def stop(self) -> None:
        self._robot.stop()

    def close(self) -> None:
        """The frames stay next to ``out`` unless ``finish`` has made a data set of them."""
        self._end()
        self._robot.close()

    def finish(self) -> int:
        """Makes the data set, and returns its number of frames. Raises UserError if the disk failed.

        The frames recorded before that then stay next to ``out``.
        """
        self._end()
        if self._failure is not None:
            raise UserError(
                f"expected to record into {self._out}, found that {self._failure}; the frames before that are in "
                f"{self._folder}: make room, and record again"
            )
        from rlrc.datasets.meta import ACTION, PICTURES, STATE, Feature
        from rlrc.datasets.writer import Recording, write

        spec, frames = self._spec, sum(count for _, count in self._episodes)
        features = {ACTION: Feature("float32", (spec.action.dim,), spec.action.names)}
        if spec.state is not None:
            features[STATE] = Feature("float32", (len(spec.state.names),), spec.state.names)
        names = {"action": ACTION, "state": STATE}
        with (self._folder / "frames").open("rb") as stream:
            if frames:
                first = _read(stream)
                stream.seek(0)
                for name in (name for name in first if name.startswith("image.")):
                    names[name] = PICTURES + name.removeprefix("image.")
                    features[names[name]] = Feature("image", first[name].shape)
            episodes = (
                Recording(task, ({names[key]: value for key, value in _read(stream).items()} for _ in range(count)))
                for task, count in self._episodes
                if count
            )
            write(self._out, self._hz, features, episodes)
        shutil.rmtree(self._folder)
        return frames

    def _end(self) -> None:
        if not self._stream.closed:
            if self._thread.is_alive():
                self._frames.put(None)
            self._thread.join()
            self._stream.close()

    def _write(self) -> None:
        try:
            for frame in self._take_frames():
                whole = io.BytesIO()
                for name, array in (*frame.items(), ("", np.zeros(0))):
                    whole.write(name.encode() + b"\n")
                    np.save(whole, array, allow_pickle=False)
                self._stream.write(whole.getvalue())
        except Exception as error:
            why = error.strerror if isinstance(error, OSError) else describe_exception(error)
            self._failure = f"the recording failed: {why}"
            for _ in self._take_frames():  # drain the queue, so that ``_end`` does not block
                pass

    def _take_frames(self) -> Iterator[dict[str, NDArray[Any]]]:
        while (frame := self._frames.get()) is not None:
            yield frame


def _read(stream: Any) -> dict[str, NDArray[Any]]:
    """The next frame: names and arrays, up to an empty name."""
    frame = {}
    while name := stream.readline().decode().removesuffix("\n"):
        frame[name] = np.load(stream, allow_pickle=False)
    np.load(stream, allow_pickle=False)
    return frame
