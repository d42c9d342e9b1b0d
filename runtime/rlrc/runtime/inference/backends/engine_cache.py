"""The cache of built TensorRT engines: its folder and file names. Needs the standard library only.

`rlrc jetson build` writes the engines; the runtime reads them. A file's name has a hash of all that the engine depends
on, so that a cache can hold engines of many artifacts and survives an upgrade of TensorRT.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from rlrc.artifact import Artifact
from rlrc.artifact.build_plan import BuildPlan, GraphPlan
from rlrc.errors import UserError
from rlrc.folders import sha256
from rlrc.libraries import cache_folder
from rlrc.strict import encode

FOLDER = "RLRC_ENGINE_CACHE"
"""The environment variable that sets another folder."""


def engine_cache() -> Path:
    """The default folder for engines."""
    if named := os.environ.get(FOLDER):
        return Path(named)
    return cache_folder() / "engines"


def engine_file(cache: Path, plan: BuildPlan, graph: GraphPlan, version: str, sm: int) -> Path:
    return cache / f"{graph.name}-{engine_key(plan, graph, version, sm)}.engine"


def engine_key(plan: BuildPlan, graph: GraphPlan, version: str, sm: int) -> str:
    """A hash of the graph's files, its profiles, the builder's settings, the release of TensorRT and the GPU."""
    parts = [encode(graph), plan.precision, plan.workspace_bytes, version, sm]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def is_intact(file: Path) -> bool:
    """Whether the engine exists and has the sha256 that was recorded when it was written."""
    recorded = file.with_suffix(".sha256")
    return file.exists() and recorded.exists() and recorded.read_text() == sha256(file)


def check_graphs(artifact: Artifact, plan: BuildPlan) -> None:
    """Raises UserError unless the plan was made from the artifact's graphs."""
    for graph in plan.graphs:
        for name, expected in graph.files.items():
            if (found := sha256(artifact.file(name))) != expected:
                raise UserError(f"expected {name} with the sha256 {expected}, found {found}; run rlrc export again")
