"""Measure the time from the start of `rlrc run` to the first command that the driver receives.

    python scripts/first_action.py OUT.json ARTIFACT [--starts 5] [--limit 3.0] [--installed BYTES]

The time includes Python, imports, the inference process, loading graphs and warm-up. The robot is stationary. Exit code
1 if the fastest start exceeds the limit; slower starts may be due to other load on the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from rlrc.artifact import PolicySpec
from rlrc.benchmarks.results import machine, results
from rlrc.robots.robot import Sensed

FILE_VARIABLE = "RLRC_FIRST_ACTION"  # names the file to which the driver writes the time
HZ = 20


class StationaryRobot:
    """A robot at the center of the policy's state range; its cameras show noise."""

    live_pictures = True

    def __init__(self, spec: PolicySpec, instruction: str) -> None:
        assert spec.state is not None
        self._noise, self._cameras = np.random.default_rng(0), spec.cameras
        self._file = Path(os.environ[FILE_VARIABLE])
        self._state = np.array(spec.state.norm.center, np.float32)
        self._instruction = instruction

    def sense(self) -> Sensed:
        now = time.monotonic()
        pictures = {
            f"image.{camera.name}": self._noise.integers(0, 256, (camera.height, camera.width, 3), np.uint8)
            for camera in self._cameras
        }
        observation: dict[str, Any] = {**pictures, "state": self._state, "instruction": self._instruction}
        return Sensed(observation, self._state, now, dict.fromkeys(pictures, now))

    def command(self, action: np.ndarray) -> None:
        if not self._file.exists():
            self._file.write_text(repr(time.monotonic()))

    def stop(self) -> None:
        pass

    def close(self) -> None:
        pass


open_robot = StationaryRobot


def measure_start(artifact: Path, file: Path) -> float:
    """Seconds from the start of the process to the first command, whose time the driver writes to ``file``."""
    file.unlink(missing_ok=True)
    command = [str(Path(sys.executable).with_name("rlrc")), "run", str(artifact), "--driver", "first_action:open_robot"]
    command += ["--profile", "metaworld", "--hz", str(HZ), "--steps", "2", "--instruction", "open the drawer", "--json"]
    began = time.monotonic()
    done = subprocess.run(
        command,
        cwd=Path(__file__).parent,
        env=os.environ | {FILE_VARIABLE: str(file)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode or not file.exists():
        sys.exit(f"expected a first action, found exit code {done.returncode}: {done.stderr.strip()}")
    return float(file.read_text()) - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--starts", type=int, default=5)
    parser.add_argument("--limit", type=float, default=3.0)
    parser.add_argument("--installed", type=int)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        artifact, file = args.artifact.absolute(), Path(folder, "first")
        first = measure_start(artifact, file)  # cold: files not yet cached, bytecode not yet written
        starts = [measure_start(artifact, file) for _ in range(args.starts)]
    row = {
        "name": f"{args.artifact.name}, rlrc run to first action",
        "first_s": round(first, 2),
        "best_s": round(min(starts), 2),
        "median_s": round(statistics.median(starts), 2),
        "starts_s": [round(start, 2) for start in starts],
        "limit_s": args.limit,
        "installed_bytes": args.installed,
        "load": [round(load, 2) for load in os.getloadavg()],
    }
    result = {"kind": "cold start", "command": "make footprint", "machine": machine.describe(threads=1), "rows": [row]}
    results.write(args.out, results.dump(result))
    print(json.dumps(row))
    return 0 if min(starts) <= args.limit else 1


if __name__ == "__main__":
    sys.exit(main())
