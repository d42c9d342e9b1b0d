"""Threads of ONNX Runtime between the parts of a pass and after it: what they cost whoever shares the processor."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from rlrc import artifact as artifacts

REFERENCE = Path(__file__).parents[1] / "reference/compressed"

IDLE = """
import os, sys, time
cores = int(sys.argv[2])
os.sched_getaffinity = lambda process: set(range(cores))
import numpy as np
from pathlib import Path
from rlrc import artifact
from rlrc.runtime.inference.policy import LocalPolicy
found = artifact.load(Path(sys.argv[1]))
policy = LocalPolicy(found, 2)
golden = np.load(found.file(artifact.GOLDEN))
observation = {name: golden[name][0] for name in golden if name.startswith("image.") or name == "state"}
observation["instruction"] = str(golden["instructions"][0])
spent = 0.0
for _ in range(20):
    policy.infer(observation)
    before = time.process_time()
    time.sleep(0.005)
    spent += time.process_time() - before
print(spent)
"""


@pytest.mark.timing
@pytest.mark.parametrize("cores", [2, 8])  # threads as many as these, and fewer
def test_no_thread_spins_between_actions(cores: int) -> None:
    pytest.importorskip("onnxruntime")
    found = subprocess.run(
        [sys.executable, "-c", IDLE, str(REFERENCE), str(cores)], capture_output=True, text=True, check=True
    )
    assert float(found.stdout) < 0.02  # of .1 s asleep, all of it where threads spin on


@pytest.mark.timing
@pytest.mark.parametrize(
    ("version", "cores", "spins"), [("1.26.0", 2, "1"), ("1.25.9", 2, "0"), ("1.25.9", 3, "1"), ("1.26.0", 3, "1")]
)
def test_threads_that_take_all_cores_spin_where_that_is_bounded(
    version: str, cores: int, spins: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    from rlrc.runtime.inference.backends import onnxruntime as backend

    found = artifacts.load(REFERENCE)
    (graph,) = (graph for graph in found.manifest.graphs if graph.name == "vision")
    monkeypatch.setattr(onnxruntime, "__version__", version)
    monkeypatch.setattr(backend, "_cores", lambda: cores)
    options = backend._session(found.file(graph.file), graph, threads=2).get_session_options()
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == spins
    assert options.get_session_config_entry("session.intra_op.spin_duration_us") == "10"
