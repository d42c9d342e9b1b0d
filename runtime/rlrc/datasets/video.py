"""Videos of many episodes, read and written by PyAV."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from fractions import Fraction
from pathlib import Path
from typing import Any, Final

import av
import numpy as np
from av.video.frame import PictureType
from numpy.typing import NDArray

from rlrc.datasets.reading import make_error, translate_errors
from rlrc.errors import UserError

CODEC: Final = "h264"
PIXELS = "yuv420p"
# A key frame every second picture, as in lerobot: any picture then takes at most two decodings. Without B-frames, the
# first picture's time is 0.
_OPTIONS = {"g": "2", "bf": "0", "crf": "18", "preset": "veryfast", "forced-idr": "1"}
_AHEAD = 8  # pictures; seek to pictures further ahead
_TOLERANCE = 0.25  # of a picture's duration: unambiguous in any time base


def check_header(file: Path, pictures: int, seconds: float) -> None:
    """Check by header and index that a video has this many pictures and reaches this time, without decoding it.

    Raises UserError if not, and for a file that is truncated or cannot be decoded.
    """
    with _translate_errors(file):
        container = av.open(str(file))
    with container:
        stream = _find_stream(container, file)
        entries: Any = getattr(stream, "index_entries", ())  # missing in older versions of PyAV
        if len(entries) and entries[-1].pos + entries[-1].size > container.size:
            raise make_error("video", file, "that it is shorter than its index says")
        end = container.duration / av.time_base if container.duration is not None else seconds
        if stream.duration is not None:
            end = float(stream.time_base * ((stream.start_time or 0) + stream.duration))
        if 0 < stream.frames < pictures or end < seconds - 1e-3:  # stamps are float32
            raise UserError(
                f"expected {pictures} pictures up to {seconds:.3f} s in {file}, as its episodes need, found "
                f"{stream.frames or 'some'} up to {end:.3f} s; copy the data set again"
            )


def _translate_errors(file: Path) -> AbstractContextManager[None]:
    """Within this context, errors of PyAV become a UserError that names the file."""
    return translate_errors(
        "video", file, av.FFmpegError, EOFError, ValueError
    )  # ValueError: pictures that cannot be converted


def _find_stream(container: Any, file: Path) -> Any:
    """The video stream of a container. Raises UserError if there is none that can be decoded."""
    streams = container.streams.video
    if not streams:
        raise make_error("video", file, "no video in it")
    if streams[0].codec_context is None:
        raise UserError(
            f"expected a video in {file} that PyAV's FFmpeg decodes, found an unknown codec; encode it as H.264 or AV1"
        )
    return streams[0]


class Video:
    """Pictures of one file by their time. Reading in order decodes each picture once; anything else seeks."""

    def __init__(self, file: Path, fps: float) -> None:
        self.file, self.fps = file, fps
        with _translate_errors(file):
            self._container = av.open(str(file))
        self._stream = _find_stream(self._container, file)
        self._stream.codec_context.thread_count = 1  # several threads delay pictures, which slows down each seek
        self._frames: Iterator[Any] = iter(())
        self._last: Any = None  # the last decoded frame

    def at(self, seconds: float) -> NDArray[np.uint8]:
        """The picture (H, W, 3) at this time. Raises UserError if the file has none there."""
        slack = _TOLERANCE / self.fps
        with _translate_errors(self.file):
            if self._last is None or not -slack <= seconds - self._last.time <= _AHEAD / self.fps:
                self._seek(max(0.0, seconds - slack))
            while self._last is not None and self._last.time < seconds - slack:
                self._next()
            if self._last is None or self._last.time > seconds + slack:
                raise UserError(
                    f"expected a picture at {seconds:.3f} s in {self.file}, found "
                    f"{'its end' if self._last is None else f'the next at {self._last.time:.3f} s'}; "
                    "copy the data set again"
                )
            picture: NDArray[np.uint8] = self._last.to_ndarray(format="rgb24")
            return picture

    def close(self) -> None:
        self._container.close()

    def _seek(self, seconds: float) -> None:
        """Seek to the last key frame before this time, or to the start of the file if its index is wrong."""
        for time in (seconds, 0.0):
            self._container.seek(int(time / self._stream.time_base), stream=self._stream)
            self._frames = self._container.decode(self._stream)
            self._next()
            if self._last is not None and self._last.time <= seconds + 2 * _TOLERANCE / self.fps:
                return

    def _next(self) -> None:
        self._last = next((frame for frame in self._frames if frame.pts is not None), None)


class VideoWriter:
    """A new file to which pictures are appended. ``seconds``: its duration, ``bytes``: encoded so far."""

    def __init__(self, file: Path, fps: float, height: int, width: int) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self.rate = Fraction(fps).limit_denominator(1001)
        self.pictures, self.bytes, self._failed = 0, 0, False
        self._container: Any = av.open(str(file), "w", options={"movflags": "faststart"})
        self._stream = self._container.add_stream(CODEC, rate=self.rate, options=dict(_OPTIONS))
        self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, PIXELS

    @property
    def seconds(self) -> float:
        return float(self.pictures / self.rate)

    def append(self, picture: NDArray[np.uint8], first: bool) -> None:
        """Append a picture (H, W, 3). The ``first`` of an episode becomes a key frame, so that episodes can be cut."""
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
        frame.pts, frame.time_base = self.pictures, 1 / self.rate
        if first:
            frame.pict_type = PictureType.I
        self.pictures += 1
        self._write(self._stream.encode(frame))

    def close(self) -> None:
        try:
            if not self._failed:
                self._write(self._stream.encode())
        finally:
            self._container.close()

    def _write(self, packets: list[Any]) -> None:
        self._failed = True  # libavformat crashes on a packet that follows a failed write
        for packet in packets:
            self.bytes += packet.size
            self._container.mux(packet)
        self._failed = False


def describe_video(fps: float, height: int, width: int) -> dict[str, Any]:
    """The entry of info.json about a camera's videos."""
    return {
        "video.height": height,
        "video.width": width,
        "video.codec": CODEC,
        "video.pix_fmt": PIXELS,
        "video.fps": int(fps) if fps == int(fps) else fps,
        "video.channels": 3,
        "has_audio": False,
        "is_depth_map": False,
    }
