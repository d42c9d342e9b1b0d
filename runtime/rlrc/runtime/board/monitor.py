"""Monitors a Jetson's sensors while something else runs on it.

    with Board.monitor() as board:
        ...                                # one reading per second
        board.latest()                     # the newest one
    summarise(board.readings())            # watts, joules, degrees, throttling

A separate process reads the sensors and writes a file. In a thread, Python's global lock, held while a sensor answers,
would delay the control loop. On other machines than Jetsons no process is started, and there are no readings.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from bisect import bisect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from itertools import islice, pairwise
from pathlib import Path
from typing import IO, Any, NamedTuple

from rlrc.runtime.board.jetson import Reading, below, parse_tegrastats, read_jtop, read_sysfs, read_text

ROOT = Path("/")
SECONDS = 1.0
ENDS_S = 2.0
KEPT = 20_000  # readings: five and a half hours
TAIL = 1 << 14  # bytes that are searched for the newest reading


class StampedReading(NamedTuple):
    """``stamp``: the monotonic clock, which all processes share."""

    stamp: float
    reading: Reading


class Board:
    """The readings of a monitoring process; none if ``file`` is None."""

    def __init__(self, file: Path | None) -> None:
        self._file = file

    @classmethod
    @contextmanager
    def monitor(cls, root: Path | None = None, seconds: float = SECONDS) -> Iterator[Board]:
        """Reads the board whose root directory is ``root`` every ``seconds`` until the end of the block."""
        root = ROOT if root is None else root
        if not is_jetson(root):
            yield cls(None)
            return
        with tempfile.TemporaryDirectory(prefix="rlrc-board-") as folder:
            file = Path(folder, "readings.jsonl")
            command = [
                sys.executable,
                "-m",
                "rlrc.runtime.board.monitor",
                str(root),
                str(seconds),
                str(file),
                str(os.getpid()),
            ]
            environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=environment)
            board = cls(file)
            try:
                yield board
            finally:
                board._wait_for_one(process)
                board._kept = board.readings()
                process.terminate()
                try:
                    process.wait(ENDS_S)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()

    _kept: Sequence[StampedReading] | None = None

    def _wait_for_one(self, process: subprocess.Popen[bytes]) -> None:
        """Waits for a first reading: the block may have ended before the process started."""
        deadline = time.monotonic() + ENDS_S
        while not self.readings() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)

    @property
    def exists(self) -> bool:
        """Whether this machine is a Jetson, so that there are readings."""
        return self._file is not None

    def readings(self) -> Sequence[StampedReading]:
        """The last ``KEPT`` readings or more, oldest first; also after the end of the block."""
        if self._kept is not None or self._file is None:
            return self._kept or []
        return _read(_older(self._file)) + _read(self._file)

    def latest(self) -> Reading | None:
        """The newest reading."""
        if self._kept is not None or self._file is None:
            return self._kept[-1].reading if self._kept else None
        found = _read(self._file, TAIL) or _read(_older(self._file), TAIL)
        return found[-1].reading if found else None


def is_jetson(root: Path = ROOT) -> bool:
    named = read_text(below(root, "proc/device-tree/compatible")) or ""
    return "tegra" in named or below(root, "etc/nv_tegra_release").exists()


def _older(file: Path) -> Path:
    """The previous file, from before the last rotation."""
    return file.with_suffix(".older")


def _read(file: Path, most: int = -1) -> list[StampedReading]:
    """The complete lines within the last ``most`` bytes, or in the whole file."""
    try:
        with file.open("rb") as stream:
            start = max(0, stream.seek(0, os.SEEK_END) - most) if most >= 0 else 0
            stream.seek(start)
            lines = stream.read().split(b"\n")[:-1]  # the rest is still being written
    except FileNotFoundError:
        return []
    return [_decode(json.loads(line)) for line in (lines[1:] if start else lines)]


def _decode(value: dict[str, Any]) -> StampedReading:
    values = value["reading"]
    return StampedReading(value["stamp"], Reading(**values | {"throttled": tuple(values["throttled"])}))


def readings_at(stamped: Sequence[StampedReading], times: Sequence[float]) -> list[Reading | None]:
    """The newest reading at each of the times; None before the first."""
    stamps = [one.stamp for one in stamped]
    places = [bisect(stamps, moment) - 1 for moment in times]
    return [stamped[place].reading if place >= 0 else None for place in places]


def summarise(stamped: Sequence[StampedReading]) -> dict[str, Any] | None:
    """Watts, energy (the integral of the watts), degrees and loads of a run; None without readings.

    ``throttled``: by kind, the fraction of the readings with it; ``overcurrent``: events since the first reading.
    """
    if not stamped:
        return None
    readings = [one.reading for one in stamped]
    pairs = [(one.stamp, one.reading.watts) for one in stamped if one.reading.watts is not None]
    kinds = sorted({kind for reading in readings for kind in reading.throttled})
    first, last = readings[0].overcurrent, readings[-1].overcurrent
    return {
        "readings": len(readings),
        "watts": _spread([watts for _, watts in pairs]),
        "joules": _area(pairs),
        "celsius": _spread([reading.hottest for reading in readings]),
        "gpu_load": _spread([reading.gpu_load for reading in readings]),
        "gpu_mhz": _spread([reading.gpu_mhz for reading in readings]),
        "memory_bytes": _spread([reading.memory_used for reading in readings]),
        "swap_bytes": _spread([reading.swap_used for reading in readings]),
        "throttled": {kind: sum(kind in reading.throttled for reading in readings) / len(readings) for kind in kinds},
        "overcurrent": {kind: last[kind] - first.get(kind, 0) for kind in last if last[kind] > first.get(kind, 0)},
    }


def format_summary(totals: Mapping[str, Any]) -> str:
    """A summary as one line of text."""
    parts = []
    for name, unit, scale in (("watts", "W", 1.0), ("celsius", "°C", 1.0), ("gpu_load", "% GPU", 100.0)):
        if (found := totals[name]) is not None:
            parts.append(f"{found['mean'] * scale:.1f} {unit} (max {found['max'] * scale:.1f})")
    if totals["joules"]:
        parts.append(f"{totals['joules']:.1f} J")
    if totals["memory_bytes"] is not None:
        parts.append(f"{totals['memory_bytes']['max'] / 1e9:.2f} GB used at most")
    if totals["swap_bytes"] is not None and totals["swap_bytes"]["max"] > totals["swap_bytes"]["min"]:
        parts.append("swapped")
    parts += [f"{kind} throttled {part:.0%} of the time" for kind, part in totals["throttled"].items()]
    parts += [f"{kind}: {events} events" for kind, events in totals["overcurrent"].items()]
    return ", ".join(parts)


def _spread(values: Sequence[float | None]) -> dict[str, float] | None:
    known = [value for value in values if value is not None]
    return {"min": min(known), "mean": sum(known) / len(known), "max": max(known)} if known else None


def _area(pairs: Sequence[tuple[float, float]]) -> float:
    """The integral by trapezoids, between the first and the last reading."""
    return sum((end - start) * (first + last) / 2 for (start, first), (end, last) in pairwise(pairs))


# The monitoring process


def record(following: Iterator[Reading], out: Path, kept: int = KEPT) -> None:
    """Writes a line per reading. After ``kept`` readings it starts a new file and keeps the previous one."""
    while True:
        written = 0
        with out.open("w", encoding="utf-8") as stream:
            for reading in islice(following, kept):
                written += 1
                stream.write(json.dumps({"stamp": time.monotonic(), "reading": asdict(reading)}) + "\n")
                stream.flush()
        if written < kept:
            return
        out.replace(_older(out))


def readings(root: Path, seconds: float) -> Iterator[Reading]:
    """Readings from all sources: tegrastats first, missing values from the files, then from jetson-stats."""
    with ExitStack() as stack:
        jetson = _jtop(stack, seconds)
        for line in _ticks(stack, seconds):
            reading = parse_tegrastats(line).merge(read_sysfs(root))
            yield reading if jetson is None else reading.merge(read_jtop(jetson))


def _ticks(stack: ExitStack, seconds: float) -> Iterator[str]:
    """tegrastats' lines as they arrive; empty ones at the same interval without tegrastats or after it has ended."""
    if shutil.which("tegrastats"):
        command = ["tegrastats", "--interval", str(max(1, round(seconds * 1e3)))]
        process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        stack.callback(process.terminate)
        yield from _lines(process.stdout)
    while True:
        yield ""
        time.sleep(seconds)


def _lines(stream: IO[str] | None) -> Iterator[str]:
    assert stream is not None
    yield from stream


def _jtop(stack: ExitStack, seconds: float) -> Any:
    """jetson-stats, if it is installed and its service answers; else None."""
    try:
        from jtop import jtop

        return stack.enter_context(jtop(interval=seconds))
    except Exception:  # its errors cannot be named without importing it
        return None


def _end_with(parent: int, folder: Path) -> None:
    """Removes the folder and exits on SIGTERM, which Linux also sends when the parent (or its thread) has died."""

    def end(*_: Any) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        sys.exit(0)  # a regular exit also terminates tegrastats

    signal.signal(signal.SIGTERM, end)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1: PR_SET_PDEATHSIG
    if os.getppid() != parent:
        end()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the parent ends this process
    _end_with(int(sys.argv[4]), Path(sys.argv[3]).parent)
    record(readings(Path(sys.argv[1]), float(sys.argv[2])), Path(sys.argv[3]))
