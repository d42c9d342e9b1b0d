"""Nothing that rlrc starts talks to the outside, nor leaves files of its own in the user's home.

Commands run under a fresh HOME in one process that strace watches, with all its children: an address that is not of
this machine, or a name server that is asked, fails the test whether or not a network is there.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rlrc import libraries
from rlrc.runtime import cli

ROOT = Path(__file__).parents[1]
STRACE = shutil.which("strace")
CALLS = "trace=connect,sendto,sendmsg,sendmmsg"
ADDRESS = re.compile(r'sin6?_port=htons\((\d+)\).*?(?:inet_addr\("([^"]+)"\)|inet_pton\(AF_INET6, "([^"]+)")')
HERE = re.compile(r"127\.|::1$|::ffff:127\.|0\.0\.0\.0$")
NAME_SERVER = "53"

# Each list is a command's arguments; a command that serves is interrupted once it has answered for a while.
RUN = """
import json, os, signal, sys, threading
from rlrc.runtime.cli import main

codes = {}
for arguments in json.loads(sys.argv[1]):
    serves = arguments[0] == "serve"
    if serves:
        threading.Timer(4, os.kill, (os.getpid(), signal.SIGINT)).start()
    name = " ".join(arguments[:2])
    try:
        codes[name] = main(arguments)
    except SystemExit as exit_:
        codes[name] = exit_.code or 0
    if codes[name] == 2:
        raise SystemExit(f"{arguments} was refused")
print("CODES", json.dumps(codes))
"""
ROBOT = [
    ["--help"],
    ["inspect", "{toy}"],
    ["verify", "{toy}"],
    ["infer", "{toy}", "{out}/observation.npz", "--out", "{out}/actions.npz"],
    ["run", "{toy}", "--env", "metaworld:drawer-open-v3", "--hz", "0", "--steps", "3"],
    ["run", "{reference}", "--env", "metaworld:drawer-open-v3", "--steps", "8", "--port", "0"],
    ["serve", "{toy}", "--port", "0", "--page", "0", "--protocol", "openpi", "gr00t", "lerobot"],
    ["bench", "latency", "{toy}", "--trials", "20"],
    ["bench", "memory", "{toy}", "--repeats", "1"],
    ["bench", "energy", "{toy}", "--seconds", ".05", "--rounds", "2"],
    ["bench", "serving", "--size", "32", "--calls", "6"],
    ["jetson", "devices"],
    ["jetson", "calibration"],
    ["jetson", "plan", "--geometry", "smolvla-450m", "--device", "orin-nano-8gb"],
    ["jetson", "install", "--write", "{out}/install"],
]
WORKSHOP = [
    ["new", "{out}/new"],
    ["inspect", "{pupil}"],
    ["data", "demonstrations", "{out}/data", "--episodes-per-task", "1", "--tasks", "drawer-open-v3", "--size", "32"],
    ["data", "inspect", "{out}/data"],
    ["sensitivity", "{pupil}", "--out", "{out}/sensitivity.json", "--picture", "{out}/sensitivity.svg"],
    ["prune", "{pupil}", "{out}/pruned", "--ratio", ".5", "--score", "magnitude", "--evaluate", "0"],
    ["sft", "{out}/pruned", "{out}/sft", "--data", "{out}/data", "--steps", "2", "--batch", "2", "--evaluate", "0"],
    [
        "distill",
        "{out}/pruned",
        "{out}/distilled",
        "--teacher",
        "{pupil}",
        "--data",
        "{out}/data",
        "--steps",
        "2",
        "--batch",
        "2",
        "--evaluate",
        "0",
    ],
    ["compare-grids", "{out}/sft"],
    ["quantize", "{out}/sft", "{out}/int4", "--evaluate", "0"],
    ["export", "{out}/int4", "{out}/exported", "--to", "onnx", "tensorrt", "--tolerance", "2"],
    [
        "bench",
        "success",
        "{out}/exported",
        "--tasks",
        "drawer-open-v3",
        "--episodes-per-task",
        "1",
        "--out",
        "{out}/success.json",
    ],
    ["report", "{out}/success.json", "--out", "{out}/report.html"],
]


def watched(commands: list[list[str]], out: Path, **places: Path) -> tuple[dict[str, int], set[str], list[str]]:
    """-> exit codes, addresses that were contacted, files that lie in the fresh HOME afterwards."""
    assert STRACE is not None
    home, trace = out / "home", out / "trace"
    home.mkdir()
    filled = [[text.format(out=out, **places) for text in command] for command in commands]
    kept = {name: value for name, value in os.environ.items() if name not in libraries.SILENT | libraries.CACHES}
    environment = kept | {"HOME": str(home), "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    environment.pop("XDG_CACHE_HOME", None)
    run = [
        STRACE,
        "-f",
        "--seccomp-bpf",
        "-qq",
        "-o",
        str(trace),
        "-e",
        CALLS,
        sys.executable,
        "-c",
        RUN,
        json.dumps(filled),
    ]
    done = subprocess.run(run, env=environment, cwd=out, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    contacted = set()
    for port, old, new in ADDRESS.findall(trace.read_text(errors="replace")):
        if port == NAME_SERVER or not HERE.match(old or new):
            contacted.add(f"{old or new} port {port}")
    files = [str(path.relative_to(home)) for path in home.rglob("*") if path.is_file()]
    return json.loads(done.stdout.split("CODES ")[-1]), contacted, files


@pytest.mark.skipif(STRACE is None, reason="strace is not installed; scripts/setup.sh installs it")
def test_the_robot_side_talks_to_nobody(metaworld_toy: Path, own_cache: Path, tmp_path: Path) -> None:
    import numpy as np

    from rlrc import artifact
    from rlrc.runtime.inference import verify

    spec = artifact.load(metaworld_toy).manifest.policy
    golden = verify.read_golden(metaworld_toy / "golden.npz", spec)
    np.savez(tmp_path / "observation.npz", **golden.observation(0, spec))
    codes, contacted, files = watched(ROBOT, tmp_path, toy=metaworld_toy, reference=ROOT / "reference" / "compressed")
    assert not contacted
    assert not files
    assert {*codes.values()} <= {0, 1}


@pytest.mark.skipif(STRACE is None, reason="strace is not installed; scripts/setup.sh installs it")
def test_the_compressor_talks_to_nobody(pupil_artifact: Path, own_cache: Path, tmp_path: Path) -> None:
    codes, contacted, files = watched(WORKSHOP, tmp_path, pupil=pupil_artifact)
    assert not contacted
    assert not files
    assert {*codes.values()} <= {0, 1}


def test_every_command_is_watched() -> None:
    """Left out: what talks to a host that the user names, what needs a Jetson, and what only repeats the others."""
    named = {" ".join(command[:words]) for command in ROBOT + WORKSHOP for words in (1, 2)}
    elsewhere = {
        "jetson deploy", "jetson rollback", "jetson build", "jetson check", "jetson doctor", "rl", "compress",
        "write-back", "bench loop", "bench throughput", "bench claims", "bench compare",
    }  # fmt: skip
    assert set(cli.COMMANDS) - named == elsewhere


def test_values_that_are_set_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "0")
    monkeypatch.delenv("HF_HUB_DISABLE_TELEMETRY", raising=False)
    libraries.keep_local()
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "0"
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"


@pytest.mark.parametrize("name", ["rlrc-run@.service", "rlrc-serve@.service", "Dockerfile"])
def test_services_and_containers_set_the_same(name: str) -> None:
    text = (ROOT / "jetson/rlrc/jetson/board/device" / name).read_text()
    assert all(f"{variable}={value}" in text for variable, value in libraries.SILENT.items())
