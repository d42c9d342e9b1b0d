"""Checks that need a process on the board: engines, GPU, and this user's groups and limits."""

from __future__ import annotations

import grp
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

from rlrc.errors import UserError
from rlrc.jetson.board.build import device_sm
from rlrc.jetson.board.doctor import GIB, Finding, known_jetpack
from rlrc.runtime.board.monitor import ROOT, is_jetson

LEAST_DISK = 2 * GIB
PRIORITY = 20  # rlrc.realtime's
IMPORT_S = 60.0
# Each in its own process: an engine that does not fit the driver may end its process.
ENGINES = {
    "onnxruntime": "import onnxruntime as o; print(o.__version__, *o.get_available_providers())",
    "llama_cpp": "import llama_cpp as l; print(l.__version__, *['GPU'] * l.llama_supports_gpu_offload())",
    "tensorrt": "import tensorrt as t; print(t.__version__)",
}


def examine() -> list[Finding]:
    return [gpu(), *(engine(name) for name in ENGINES), group(), priority(), disk(Path.cwd())]


def gpu() -> Finding:
    try:
        sm = device_sm()
    except UserError as error:
        if not is_jetson(ROOT):
            return Finding("GPU", "none", "no NVIDIA driver")
        return Finding("GPU", "fix", str(error), "sudo apt-get install nvidia-l4t-cuda, and restart")
    return Finding("GPU", "ok", f"SM {sm // 10}.{sm % 10}")


def engine(name: str) -> Finding:
    """Importable, and on a Jetson with its GPU."""
    board = is_jetson(ROOT)
    try:
        done = subprocess.run(
            [sys.executable, "-c", ENGINES[name]], capture_output=True, text=True, timeout=IMPORT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return Finding(name, "fix", f"its import takes more than {IMPORT_S:.0f} s", "install it again")
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        reason = lines[-1] if lines else f"exit code {done.returncode}"
        found = "not installed" if f"No module named {name!r}" in reason else f"does not import: {reason}"
        todo = "rlrc jetson install" if name != "tensorrt" else "an environment with --system-site-packages"
        return Finding(name, "advice" if board else "none", found, todo if board else "")
    version, *has = done.stdout.split()
    text = f"{version} {', '.join(provider.removesuffix('ExecutionProvider') for provider in has)}".strip()
    if board and name != "tensorrt" and not {"GPU", "CUDAExecutionProvider"} & set(has):
        known = known_jetpack(ROOT)
        index = f" from {known[1].wheels}" if known and name == "onnxruntime" else ""
        return Finding(name, "advice", f"{text}, without the GPU", f"rlrc jetson install: a build with CUDA{index}")
    return Finding(name, "ok", text)


def group() -> Finding:
    if not is_jetson(ROOT):
        return Finding("groups", "none", "no device here belongs to the group video")
    names = {grp.getgrgid(number).gr_name for number in os.getgroups()}
    if os.geteuid() == 0 or "video" in names:
        return Finding("groups", "ok", "may use the GPU and cameras")
    return Finding("groups", "fix", "not in the group video", "sudo usermod -aG video,render $USER, and log in again")


def priority() -> Finding:
    """Real-time priority and locked memory, which a steady rate needs. Root has both."""
    allowed, locked = resource.getrlimit(resource.RLIMIT_RTPRIO)[0], resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if os.geteuid() == 0 or (allowed >= PRIORITY and locked == resource.RLIM_INFINITY):
        return Finding("real time", "ok", "priority and locked memory are granted")
    text = f"priority up to {allowed}, {'unlimited' if locked < 0 else f'{locked >> 10} KiB of'} locked memory"
    todo = f"/etc/security/limits.d/rlrc.conf: rtprio {PRIORITY}, memlock unlimited; the service has them"
    return Finding("real time", "advice", text, todo)


def disk(where: Path) -> Finding:
    free = shutil.disk_usage(where).free
    if free < LEAST_DISK:
        return Finding(
            "disk", "advice", f"{free / GIB:.1f} GiB free here", "artifacts and engines need room: free some"
        )
    return Finding("disk", "ok", f"{free / GIB:.1f} GiB free here")
