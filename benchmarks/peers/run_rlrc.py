"""An artifact's graphs as a contestant: run_rlrc.py ARTIFACT OBSERVATION.npz THREADS."""

from __future__ import annotations

import sys
from pathlib import Path

from protocol import Opened, observation, serve


def main() -> Opened:
    from rlrc import artifact as artifacts
    from rlrc.benchmarks.results.results import precision
    from rlrc.runtime.inference.policy import LocalPolicy

    folder, inputs, threads = Path(sys.argv[1]), observation(sys.argv[2]), int(sys.argv[3])
    policy = LocalPolicy(artifacts.load(folder, verify=()), threads)
    versions = policy.engine.versions()
    engine = next(iter(versions))
    precisions = precision(policy.artifact.manifest)
    return Opened(lambda: policy.infer(inputs)["actions"], precisions, f"{engine} {versions[engine]}")


serve(main)
