"""The artifact: the format in which the parts of rlrc exchange policies.

An artifact is a folder that is never changed in place. ``manifest.json`` describes it completely: the policy (cameras,
state, prompt, action), the shape of every layer of its towers, its quantization, its graphs and their verification, its
history, and the sha256 and size of every other file. Reading is strict: unknown keys, missing files and wrong hashes
are refused. Writing is atomic: a killed stage leaves no artifact or a complete one. Needs the standard
library only.
"""

from rlrc.artifact.folder import (
    GOLDEN,
    MANIFEST,
    TOKENIZER,
    WEIGHTS,
    Artifact,
    ArtifactError,
    Draft,
    create_artifact,
    from_json,
    load,
    to_json,
    weight_files,
)
from rlrc.artifact.spec import (
    FORMAT_VERSION,
    ActionSpec,
    CameraSpec,
    FileSpec,
    FlowSpec,
    GraphSpec,
    HistoryEntry,
    LayerSpec,
    Manifest,
    NormStats,
    PolicySpec,
    PromptSpec,
    QuantizationSpec,
    StateSpec,
    TensorSpec,
    TokenSpec,
    TowerSpec,
    VerifiedSpec,
)
from rlrc.folders import check_output

# fmt: off
__all__ = [
    "FORMAT_VERSION", "GOLDEN", "MANIFEST", "TOKENIZER", "WEIGHTS", "ActionSpec", "Artifact", "ArtifactError",
    "CameraSpec", "Draft", "FileSpec", "FlowSpec", "GraphSpec", "HistoryEntry", "LayerSpec", "Manifest", "NormStats",
    "PolicySpec", "PromptSpec", "QuantizationSpec", "StateSpec", "TensorSpec", "TokenSpec", "TowerSpec", "VerifiedSpec",
    "check_output", "create_artifact", "from_json", "load", "to_json", "weight_files",
]
# fmt: on
