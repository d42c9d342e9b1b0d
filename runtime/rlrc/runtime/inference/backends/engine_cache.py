"""Built TensorRT engines: where they lie and how they are named. Needs the standard library only.

`rlrc jetson build` writes them, the runtime reads them. An engine's file is named by a hash of all that it depends on,
so that a cache may hold those of many artifacts and survives an upgrade of TensorRT.
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
"""The variable that names another folder."""


def engine_cache() -> Path:
    """The folder that engines are built into and read from unless another is given."""
    if named := os.environ.get(FOLDER):
        return Path(named)
    return cache_folder() / "engines"


def engine_file(cache: Path, plan: BuildPlan, graph: GraphPlan, version: str, sm: int) -> Path:
    return cache / f"{graph.name}-{engine_key(plan, graph, version, sm)}.engine"


def engine_key(plan: BuildPlan, graph: GraphPlan, version: str, sm: int) -> str:
    """Of the graph's files, its profiles, the builder's settings, the release of TensorRT and the GPU."""
    parts = [encode(graph), plan.precision, plan.workspace_bytes, version, sm]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def is_intact(file: Path) -> bool:
    """Whether the engine is there and as it was written."""
    told = file.with_suffix(".sha256")
    return file.exists() and told.exists() and told.read_text() == sha256(file)


def check_graphs(artifact: Artifact, plan: BuildPlan) -> None:
    """Raises UserError unless the plan is of the very graphs in the artifact."""
    for graph in plan.graphs:
        for name, expected in graph.files.items():
            if (found := sha256(artifact.file(name))) != expected:
                raise UserError(f"expected {name} with the sha256 {expected}, found {found}; run rlrc export again")
