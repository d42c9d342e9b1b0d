"""Plain graphs on ONNX Runtime as a contestant: run_stock.py DENSE FP32 OBSERVATION.npz THREADS.

Runs the same computation in standard operators, float32, in default sessions (benchmarks/studies/plain_graphs.py).
DENSE is the artifact with the weights; FP32 supplies rlrc's pre- and post-processing.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from protocol import Opened, observation, serve

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks/studies"))


def main() -> Opened:
    import onnxruntime
    from plain_graphs import Stock

    from rlrc import artifact as artifacts
    from rlrc.runtime.inference.policy import LocalPolicy

    dense, exported = (artifacts.load(Path(argument), verify=()) for argument in sys.argv[1:3])
    inputs, threads = observation(sys.argv[3]), int(sys.argv[4])
    folder = tempfile.TemporaryDirectory()
    policy = LocalPolicy(exported, threads, engine=Stock(dense, Path(folder.name), int8=False, threads=threads))
    policy.held = folder  # type: ignore[attr-defined]  # keeps the mapped files
    return Opened(lambda: policy.infer(inputs)["actions"], "fp32", f"onnxruntime {onnxruntime.__version__}")


serve(main)
