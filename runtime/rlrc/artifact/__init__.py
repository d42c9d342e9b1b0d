"""The artifact: the only thing that passes between the parts of rlrc.

An artifact is a folder that is never changed in place. ``manifest.json`` describes it completely: the policy (cameras,
state, prompt, action), the per-layer geometry of its towers, its quantization, its graphs, what was verified about
them, how it came to be, and the sha256 and size of every other file. Reading is strict: unknown keys, missing files and
wrong hashes are refused. Writing is atomic: a killed stage leaves no artifact or a whole one. Needs the standard
library only.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from rlrc import foreign
from rlrc.artifact.consistency import check_consistent, is_inside
from rlrc.errors import UserError
from rlrc.folders import appearing, check_output, sha256, sync
from rlrc.strict import StrictError, decode, encode, parse

# fmt: off
__all__ = [
    "FORMAT_VERSION", "GOLDEN", "MANIFEST", "TOKENIZER", "ActionSpec", "Artifact", "ArtifactError", "CameraSpec",
    "Draft", "FileSpec", "FlowSpec", "GraphSpec", "HistoryEntry", "LayerSpec", "Manifest", "NormStats", "PolicySpec",
    "PromptSpec", "QuantizationSpec", "StateSpec", "TensorSpec", "TokenSpec", "TowerSpec", "VerifiedSpec",
    "check_output", "from_json", "load", "to_json", "writing",
]
# fmt: on

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
GOLDEN = "golden.npz"  # observations with what the torch policy answers
TOKENIZER = "tokenizer/tokenizer.json"


@dataclass(frozen=True)
class NormStats:
    """Per-dimension affine normalisation: ``normalised = (raw - center) / scale``, clipped to ``[-clip, clip]`` if set.

    Mean/std statistics are (mean, std); bounds or quantiles are ((high + low) / 2, (high - low) / 2); a dimension left
    alone is (0, 1).
    """

    center: tuple[float, ...]
    scale: tuple[float, ...]
    clip: float | None = None


@dataclass(frozen=True)
class CameraSpec:
    """The policy gets ``(picture / 255 - mean) / std``, float32 (height, width, C) or (C, height, width).

    ``mean`` and ``std`` have three numbers for every vision encoder: the colours are repeated for each. ``resize``:
    "none" refuses a picture of any other size; "bilinear" and "bicubic" are PIL's, which filter when they shrink;
    "pad" and "pad-left-top" keep the proportions (bilinear on floats, without a filter) and fill the rest with black,
    on all sides or on the left and top only. An ``optional`` camera may be missing: its tokens are left out.
    """

    name: str
    height: int
    width: int
    resize: Literal["none", "bilinear", "bicubic", "pad", "pad-left-top"]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    layout: Literal["HWC", "CHW"]
    optional: bool = False


@dataclass(frozen=True)
class StateSpec:
    """Proprioception: the meaning of every dimension, its unit, and how it is normalised.

    The policy gets ``width`` numbers, the last ones zero (None: as many as there are names).
    """

    names: tuple[str, ...]
    units: tuple[str, ...]
    norm: NormStats
    width: int | None = None


@dataclass(frozen=True)
class PromptSpec:
    """Instruction to ids: edited, put into ``template``, tokenized, completed by ``suffix``, padded on the right.

    ``edits``, in order: "lower" case; "strip" blanks at both ends; "blanks" for underscores and line ends; "newline" at
    the end if there is none. ``{instruction}`` and ``{state}`` in the template are replaced, the latter by the
    normalised state as numbers of ``state_bins`` equal bins over [-1, 1] (the policy then gets no other state), after
    zeros behind it have made it ``state_width`` numbers long (0: as many as it has).
    ``suffix`` is appended unless the ids already end with it. Beyond ``max_tokens`` a prompt is cut (``truncate``) or
    refused.
    ``pad_id`` None: not padded. ``known`` are pieces whose ids tell that the vocabulary is the right one.
    """

    template: str
    max_tokens: int
    pad_id: int | None
    edits: tuple[Literal["lower", "strip", "blanks", "newline"], ...] = ()
    suffix: tuple[int, ...] = ()
    state_bins: int = 0
    state_width: int = 0
    truncate: bool = False
    known: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class TokenSpec:
    """Action bins among a language model's tokens: row r of the logits is token ``offset + r``; ``first - i`` is bin i.

    Any other token counts as the nearest bin (OpenVLA, arXiv 2406.09246, section 3.2).
    """

    rows: int
    offset: int
    first: int


@dataclass(frozen=True)
class FlowSpec:
    """Flow matching: noise (horizon, width) at t = 1 becomes a chunk at t = 0 in ``steps`` Euler steps."""

    steps: int
    width: int


@dataclass(frozen=True)
class ActionSpec:
    """A chunk of ``horizon`` actions. ``bins`` of equal width over [-1, 1] in normalised units; 0: continuous.

    ``tokens``: which tokens of a vocabulary stand for the bins (None: the logits are over the bins themselves).
    """

    horizon: int
    names: tuple[str, ...]
    meaning: tuple[Literal["absolute", "delta", "velocity", "gripper"], ...]
    units: tuple[str, ...]
    norm: NormStats
    bins: int
    tokens: TokenSpec | None = None

    @property
    def dim(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class PolicySpec:
    """What a policy sees and does. ``geometry``: its own scalars (patch sizes, ...), checked by the backbone."""

    family: str
    decode: Literal["parallel", "autoregressive", "flow"]
    cameras: tuple[CameraSpec, ...]
    state: StateSpec | None
    prompt: PromptSpec | None  # None: a policy of one task, without language
    action: ActionSpec
    geometry: dict[str, Any]
    flow: FlowSpec | None = None


@dataclass(frozen=True)
class LayerSpec:
    """One transformer block: attention heads, key/value heads, size of a head, width of the MLP.

    A "cross" block attends to another tower's keys and values only; a "half" one has nothing but keys and values, which
    is all that is used of the last block of a prefix.
    """

    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    kind: Literal["self", "cross", "half"] = "self"


@dataclass(frozen=True)
class TowerSpec:
    """A stack of blocks on one residual stream of ``width`` channels; every block may have its own shape.

    ``eps`` of the norms; ``activation`` of the MLPs (None: SiLU in decoders, GELU in vision transformers); ``theta`` of
    the rotary positions; ``norm_offset`` is added to the norms' weights (Gemma stores them minus one). ``norm``
    "adaptive": modulated by the flow's time; "steps": the same from a table of the fixed flow steps.
    """

    width: int
    layers: tuple[LayerSpec, ...]
    eps: float = 1e-5
    activation: Literal["silu", "gelu", "gelu-tanh", "relu"] | None = None
    theta: float = 10_000.0
    norm: Literal["rms", "adaptive", "steps"] = "rms"
    norm_offset: float = 0.0


@dataclass(frozen=True)
class QuantizationSpec:
    """Symmetric integers, groups along the input dimension with an fp16 scale each: ``group`` inputs, or half of that
    (and so on, down to 32) where the dimension is no multiple of it.

    ``tensors`` maps the name of every quantized tensor to its bits, 4 or 8; ``grid`` says which most of the weights
    have.
    """

    grid: Literal["int4", "int8"]
    group: int
    tensors: dict[str, int]


@dataclass(frozen=True)
class TensorSpec:
    name: str
    dtype: str
    shape: tuple[int | str, ...]  # a string names a dynamic dimension


@dataclass(frozen=True)
class GraphSpec:
    """A file the runtime loads. ``needs`` says what the engine must offer, e.g. {"onnxruntime": ">=1.18"}."""

    name: str
    backend: Literal["onnxruntime", "tensorrt", "gguf"]
    file: str
    precision: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    needs: dict[str, str]


@dataclass(frozen=True)
class VerifiedSpec:
    """Measured agreement of a backend's graphs with the fp32 torch policy on golden.npz, in action units.

    ``max_error`` is per action dimension, over all tokens but flips at ties of the reference; ``token_flips`` counts
    differing tokens of ``tokens``; ``chunk_jitter`` is the largest step-to-step difference that the graphs add within
    a chunk. ``range_error`` is per dimension and part of its range, without the worst hundredth of the observations;
    where ``range_tolerance`` is given, that is what it is held to instead of ``tolerance``. Logits of the reference
    within ``spacing`` of its best, relative to that, counted as ties too.
    """

    backend: str
    observations: int
    tokens: int
    token_flips: int
    gripper_flips: int
    max_error: tuple[float, ...]
    chunk_jitter: float
    tolerance: float
    versions: dict[str, str]
    range_error: tuple[float, ...] = ()
    range_tolerance: float | None = None
    spacing: float = 0.0


@dataclass(frozen=True)
class HistoryEntry:
    """One stage: its full configuration, the tool's version, the parent's manifest hash, its cost and metrics.

    ``precision``: what its products were computed in, by type of device.
    """

    stage: str
    config: dict[str, Any]
    version: str
    parent: str | None
    cpu_minutes: float
    before: dict[str, Any] = field(default_factory=dict)
    after: dict[str, Any] = field(default_factory=dict)
    precision: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class FileSpec:
    sha256: str
    size: int


@dataclass(frozen=True)
class Manifest:
    policy: PolicySpec
    towers: dict[str, TowerSpec]
    parameters: int
    dtype: Literal["float32", "bfloat16", "int4", "int8"]
    quantization: QuantizationSpec | None = None
    graphs: tuple[GraphSpec, ...] = ()
    verified: tuple[VerifiedSpec, ...] = ()
    history: tuple[HistoryEntry, ...] = ()
    files: dict[str, FileSpec] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION


class ArtifactError(UserError):
    """An artifact that is incomplete, damaged or does not fit its own description."""


@dataclass(frozen=True)
class Artifact:
    """A loaded artifact. ``digest`` is the sha256 of manifest.json, which pins the hash of every other file."""

    path: Path
    manifest: Manifest
    digest: str

    def file(self, relative: str) -> Path:
        """The path of a file that the manifest lists. Raises ArtifactError for any other."""
        if relative not in self.manifest.files:
            listed = ", ".join(sorted(self.manifest.files)) or "no files"
            raise ArtifactError(
                f"expected {relative} in the artifact {self.path}, found {listed}; run the stage that makes it first"
            )
        return self.path / relative

    def verify(self, *prefixes: str) -> None:
        """Checks the sha256 of these files and folders. Raises ArtifactError."""
        for relative, spec in self.manifest.files.items():
            if any(PurePosixPath(relative).is_relative_to(prefix) for prefix in prefixes):
                _check_file(self.path / relative, spec, hashed=True)


def load(path: str | Path, verify: Collection[str] | None = None) -> Artifact:
    """Reads and checks an artifact.

    The presence and size of every file are always checked. ``verify`` None also checks every sha256; else only those
    of the given files and folders ("graphs", "golden.npz"). Raises ArtifactError.
    """
    path = Path(path)
    verify = (verify,) if isinstance(verify, str) else verify
    if not path.is_dir():
        raise ArtifactError(f"expected an artifact folder at {path}, found {foreign.found(path)}")
    try:
        text = (path / MANIFEST).read_bytes()
    except FileNotFoundError:
        missing = f"expected {path / MANIFEST}, found: No such file or directory"
        raise ArtifactError(f"{missing}; {path} is {foreign.found(path)}") from None
    except OSError as error:
        raise ArtifactError(f"expected {path / MANIFEST}, found: {error.strerror}; make it readable") from None
    try:
        manifest = from_json(parse(text))
        for relative, spec in manifest.files.items():
            hashed = verify is None or any(PurePosixPath(relative).is_relative_to(prefix) for prefix in verify)
            _check_file(path / relative, spec, hashed)
    except OSError as error:
        raise ArtifactError(f"expected readable files in {path}, found: {error}; fix the permissions") from None
    except UserError as error:
        raise ArtifactError(f"{path}: {error}") from None
    return Artifact(path, manifest, hashlib.sha256(text).hexdigest())


def to_json(manifest: Manifest) -> dict[str, Any]:
    """The manifest as JSON values. Raises ArtifactError for what does not fit, such as NaN or an array."""
    try:
        values: dict[str, Any] = encode(manifest)
    except StrictError as error:
        raise ArtifactError(str(error)) from None
    from_json(values)
    return values


def from_json(values: Any) -> Manifest:
    """The manifest that these values describe. Raises ArtifactError naming the key of anything that does not fit."""
    version = values.get("format_version") if isinstance(values, dict) else None
    if type(version) is not int or version < 1:
        raise ArtifactError(
            f"expected an object with a format_version from 1 to {FORMAT_VERSION}, found format_version {version!r}"
        )
    if version > FORMAT_VERSION:
        raise ArtifactError(
            f"expected a format_version up to {FORMAT_VERSION}, found {version}, which is newer; upgrade rlrc"
        )
    try:
        if (
            "files" not in values
        ):  # it has a default for the stages' sake, but a manifest that pins nothing is no manifest
            raise StrictError("expected the key files, found none")
        manifest = decode(Manifest, values)
        check_consistent(manifest)
    except StrictError as error:
        raise ArtifactError(f"{error}; make the artifact again with this version of rlrc") from None
    return manifest


class Draft:
    """An artifact being written, in a temporary folder ``path``. The caller fills it and calls ``finish`` once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.finished = False
        self._inherited: dict[str, FileSpec] = {}

    def file(self, relative: str) -> Path:
        """Where to write this file; its folder exists. An inherited one is refused: that would change the parent."""
        if relative in self._inherited:
            raise RuntimeError(
                f"{relative} is inherited and may be a hard link into the parent; do not inherit what you rewrite"
            )
        if not is_inside(relative):
            raise RuntimeError(f"expected a plain relative path, found {relative!r}")
        path = self.path / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def inherit(self, parent: Artifact, *prefixes: str) -> None:
        """Takes over these files and folders of the parent, unchanged: hard-linked where possible, else copied."""
        for relative, spec in parent.manifest.files.items():
            if any(PurePosixPath(relative).is_relative_to(prefix) for prefix in prefixes):
                target = self.file(relative)
                try:
                    os.link(parent.path / relative, target)
                except OSError:
                    shutil.copyfile(parent.path / relative, target)
                self._inherited[relative] = spec

    def finish(self, manifest: Manifest) -> Manifest:
        """Hashes and syncs what was written, then writes manifest.json. Returns the manifest with ``files`` filled in.

        Raises ArtifactError if the manifest contradicts itself or an inherited file is not what its parent promised.
        """
        if self.finished:
            raise RuntimeError("finish() was called twice")
        for relative, spec in self._inherited.items():
            _check_file(self.path / relative, spec, hashed=True)
        paths = sorted(path for path in self.path.rglob("*") if not path.is_dir())
        files = {path.relative_to(self.path).as_posix(): FileSpec(sha256(path), path.stat().st_size) for path in paths}
        manifest = replace(manifest, files=files)
        text = json.dumps(to_json(manifest), indent=1, allow_nan=False) + "\n"
        for path in [*paths, *(folder for folder in self.path.rglob("*") if folder.is_dir())]:
            sync(path)
        (self.path / MANIFEST).write_text(text, encoding="utf-8")
        sync(self.path / MANIFEST)
        sync(self.path)
        self.finished = True
        return manifest


@contextmanager
def writing(out: str | Path) -> Iterator[Draft]:
    """Writes a new artifact: the whole of it appears at ``out``, or nothing does (see rlrc.folders.appearing)."""
    with appearing(out) as path:
        draft = Draft(path)
        yield draft
        if not draft.finished:
            raise RuntimeError(f"the artifact {out} was left without finish()")


def _check_file(path: Path, spec: FileSpec, hashed: bool) -> None:
    if not path.is_file():
        raise ArtifactError(f"expected the file {path}, found none; copy the artifact again")
    if path.stat().st_size != spec.size:
        raise ArtifactError(
            f"expected {spec.size} bytes in {path}, found {path.stat().st_size}; copy the artifact again"
        )
    if hashed and (found := sha256(path)) != spec.sha256:
        raise ArtifactError(
            f"expected sha256 {spec.sha256[:12]}... of {path}, found {found[:12]}...; copy the artifact again"
        )
