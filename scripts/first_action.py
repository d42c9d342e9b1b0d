"""How long a robot waits for its first action: a process that runs `rlrc run` is started, and a driver takes the time.

    python scripts/first_action.py OUT.json ARTIFACT [--starts 5] [--limit 3.0] [--installed BYTES]

The whole process counts: Python, imports, the policy's process, its graphs and warming up. The robot is a hand that
stays where it is; its first command ends the measurement. Exit code 1 if the fastest start is above the limit: what
others do on this machine is not our cost.
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

TOLD = "RLRC_FIRST_ACTION"  # the file that the driver writes the time into
HZ = 20


class Still:
    """A robot of rlrc.robots.robot at the middle of what its policy was trained on, seen by cameras that show noise."""

    live_pictures = True

    def __init__(self, spec: PolicySpec, instruction: str) -> None:
        assert spec.state is not None
        self._noise, self._cameras, self._told = np.random.default_rng(0), spec.cameras, Path(os.environ[TOLD])
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
        if not self._told.exists():
            self._told.write_text(repr(time.monotonic()))

    def stop(self) -> None:
        pass

    def close(self) -> None:
        pass


def open_robot(spec: PolicySpec, instruction: str) -> Still:
    return Still(spec, instruction)


def seconds(artifact: Path, told: Path) -> float:
    """From the start of the process to the first command, which ``told`` is for."""
    told.unlink(missing_ok=True)
    command = [str(Path(sys.executable).with_name("rlrc")), "run", str(artifact), "--driver", "first_action:open_robot"]
    command += ["--profile", "metaworld", "--hz", str(HZ), "--steps", "2", "--instruction", "open the drawer", "--json"]
    began = time.monotonic()
    done = subprocess.run(
        command,
        cwd=Path(__file__).parent,
        env=os.environ | {TOLD: str(told)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode or not told.exists():
        sys.exit(f"expected a first action, found exit code {done.returncode}: {done.stderr.strip()}")
    return float(told.read_text()) - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--starts", type=int, default=5)
    parser.add_argument("--limit", type=float, default=3.0)
    parser.add_argument("--installed", type=int)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        artifact, told = given.artifact.absolute(), Path(folder, "first")
        first = seconds(artifact, told)  # with what it reads not yet in memory, and bytecode not yet written
        starts = [seconds(artifact, told) for _ in range(given.starts)]
    row = {
        "name": f"{given.artifact.name}, rlrc run to first action",
        "first_s": round(first, 2),
        "best_s": round(min(starts), 2),
        "median_s": round(statistics.median(starts), 2),
        "starts_s": [round(start, 2) for start in starts],
        "limit_s": given.limit,
        "installed_bytes": given.installed,
        "load": [round(load, 2) for load in os.getloadavg()],
    }
    result = {"kind": "cold start", "command": "make footprint", "machine": machine.describe(threads=1), "rows": [row]}
    results.write(given.out, results.dump(result))
    print(json.dumps(row))
    return 0 if min(starts) <= given.limit else 1


if __name__ == "__main__":
    sys.exit(main())
