"""What a policy costs in memory: bytes on disk that the runtime loads, and the memory of a fresh process that runs it.

The process is measured four times: bare interpreter, libraries imported, policy loaded, policy running. The
difference of the last and the second is the policy's own; anonymous memory is told apart from file-backed pages
(shared libraries and mapped weights, which the system may drop and read again). Files that were read and closed stay
in the page cache and count nowhere.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

STAGES = ("interpreter", "imported", "loaded", "running")
TIMEOUT_S = 300.0


def measure(path: Path, threads: int = 1, inferences: int = 20) -> dict[str, dict[str, int]]:
    """Stage -> {"rss", "pss", "anonymous", "file", "peak"} in bytes, of a fresh process.

    ``pss`` counts a page shared by n processes as 1/n; ``peak`` is the largest rss so far. Raises RuntimeError if the
    process fails or takes longer than five minutes, and where the system has no /proc (not Linux).
    """
    if not Path("/proc/self/smaps_rollup").exists():
        raise RuntimeError("memory of a process is read from /proc/self/smaps_rollup, which this system does not have")
    command = [sys.executable, "-m", "rlrc.benchmarks.memory", str(path.resolve()), str(threads), str(inferences)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"the process that loads {path.name} did not end within {TIMEOUT_S:.0f} s") from None
    if done.returncode != 0:
        reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise RuntimeError(f"the process that loads {path.name} failed: {reason}")
    return json.loads(done.stdout.splitlines()[-1])


def row(stages: dict[str, dict[str, int]]) -> dict[str, Any]:
    """The measured part of a table row. ``own``: what the policy adds to a process that has imported the runtime."""
    before, after = stages["imported"], stages["running"]
    own = {key: after[key] - before[key] for key in ("rss", "pss", "anonymous", "file")}
    # Loading reads and converts: its peak can be above what stays.
    return {"memory": {**stages, "own": {**own, "peak": after["peak"] - before["rss"]}}}


def read_process() -> dict[str, int]:
    """Memory of this process now, in bytes."""
    rollup = Path("/proc/self/smaps_rollup").read_text()
    status = Path("/proc/self/status").read_text()
    rss, pss = _kilobytes(rollup, "Rss"), _kilobytes(rollup, "Pss")
    anonymous = _kilobytes(rollup, "Anonymous")
    return {
        "rss": rss,
        "pss": pss,
        "anonymous": anonymous,
        "file": rss - anonymous,
        "peak": _kilobytes(status, "VmHWM"),
    }


def _kilobytes(text: str, key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB", text, re.MULTILINE)
    if found is None:
        raise RuntimeError(f"/proc does not tell {key}")
    return int(found.group(1)) * 1024


def _child(path: str, threads: int, inferences: int) -> dict[str, dict[str, int]]:
    stages = {"interpreter": read_process()}

    import numpy as np  # here: what an import costs is measured

    from rlrc.runtime.backends import onnxruntime  # noqa: F401
    from rlrc.runtime.policy import LocalPolicy

    stages["imported"] = read_process()

    policy = LocalPolicy.load(Path(path), threads=threads)
    stages["loaded"] = read_process()
    spec = policy.spec
    observation: dict[str, Any] = {"instruction": "move"}
    for camera in spec.cameras:
        observation[f"image.{camera.name}"] = np.zeros((camera.height, camera.width, 3), np.uint8)
    if spec.state:
        observation["state"] = np.zeros(len(spec.state.names), np.float32)
    for _ in range(inferences):
        policy.infer(observation)
    stages["running"] = read_process()
    return stages


if __name__ == "__main__":
    print(json.dumps(_child(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
