"""The input of a stage: an artifact, or directly an official checkpoint."""

from __future__ import annotations

import dataclasses
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import numpy as np
from torch import Tensor

from rlrc import artifact as artifacts
from rlrc.artifact import (
    GOLDEN,
    TOKENIZER,
    WEIGHTS,
    Artifact,
    Draft,
    HistoryEntry,
    PolicySpec,
    TowerSpec,
    weight_files,
)
from rlrc.artifact.describe import Recorded, recorded_normalisation
from rlrc.checkpoint_folder import Flags, is_checkpoint
from rlrc.compressor.checkpoints import folder, hub, reader, tokenizers
from rlrc.compressor.checkpoints.folder import Folder
from rlrc.compressor.checkpoints.layout import Layout
from rlrc.compressor.checkpoints.torch_policy import tokenizer_of
from rlrc.compressor.models.meta import build_on_meta
from rlrc.compressor.models.policy import PolicyModule
from rlrc.compressor.models.storage.tensors import Tensors
from rlrc.compressor.models.weights import build_policy, tensors_of
from rlrc.compressor.prune.lossless import Cut, list_unread
from rlrc.compressor.stages.artifact_io import CURVES, load_policy, read_observations
from rlrc.errors import UserError
from rlrc.runtime.inference.preprocess import prepare
from rlrc.runtime.inference.prompts import Tokenizer
from rlrc.strict import encode

INSTRUCTIONS = ("pick up the red cube", "close the drawer", "put the spoon on the towel", "open the box on the left")
EXAMPLES = len(INSTRUCTIONS)


class PolicySource(Protocol):
    """``digest`` and ``history`` are those of an artifact; an official checkpoint has a history of one entry."""

    spec: PolicySpec
    towers: dict[str, TowerSpec]
    digest: str | None
    history: tuple[HistoryEntry, ...]
    quantized: bool
    normalisation: Recorded  # the known normalisation of inputs and actions
    unread: list[Cut]  # parts of an official checkpoint that no action depends on

    @property
    def identity(self) -> str:
        """What a run that goes on must find again: the artifact's digest, or the checkpoint's path and files."""
        ...

    def load(self) -> PolicyModule: ...

    def check_unchanged(self) -> None:
        """Raises UserError if an official checkpoint's weights have changed since it was opened."""

    def copy_files(self, draft: Draft) -> None:
        """Copy the tokenizer and the curves of earlier stages to a draft."""

    def observations(self) -> dict[str, np.ndarray]:
        """The raw observations for golden.npz."""
        ...

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer of the prompt; None for a policy without language."""
        ...


def open_source(path: Path, flags: Flags, incomplete: bool = False) -> PolicySource:
    """Open an artifact or an official checkpoint, without reading its weights.

    ``incomplete``: statistics may be missing, because the caller supplies them. Raises UserError if no stage can start
    from it.
    """
    return (
        OfficialSource(path, flags, incomplete) if is_checkpoint(path, flags) else ArtifactSource(artifacts.load(path))
    )


def replace_spec(policy: PolicyModule, spec: PolicySpec) -> PolicyModule:
    """The policy's weights with another specification."""
    if policy.spec == spec:
        return policy
    return build_policy(spec, policy.towers, tensors_of(policy), "the policy")


def check_unquantized(source: PolicySource, path: str | Path) -> None:
    """Raises UserError for quantized weights, which a stage would store as floats or round a second time."""
    if source.quantized:
        raise UserError(
            f"expected an unquantized artifact, found int4 or int8 in {path}; start from the one that it was quantized "
            "from, and quantize last"
        )


def shapes(source: PolicySource) -> dict[str, Tensor]:
    """The policy's state dict on the meta device."""
    return build_on_meta(source.spec, source.towers).state_dict()


class ArtifactSource:
    def __init__(self, artifact: Artifact) -> None:
        if not weight_files(artifact.manifest):
            raise UserError(
                f"expected trainable weights ({WEIGHTS}) in {artifact.path}, found none; start from an artifact of the "
                "compressor"
            )
        self.artifact = artifact
        self.spec, self.towers = artifact.manifest.policy, artifact.manifest.towers
        self.digest: str | None = artifact.digest
        self.history: tuple[HistoryEntry, ...] = artifact.manifest.history
        self.quantized = artifact.manifest.quantization is not None
        self.normalisation = recorded_normalisation(self.history)
        self.unread: list[Cut] = []

    def load(self) -> PolicyModule:
        return replace_spec(load_policy(self.artifact), self.spec)

    @property
    def identity(self) -> str:
        return self.artifact.digest

    def check_unchanged(self) -> None:
        """An artifact never changes."""

    def copy_files(self, draft: Draft) -> None:
        draft.inherit(self.artifact, TOKENIZER, CURVES)

    def observations(self) -> dict[str, np.ndarray]:
        if widths(self.spec) != widths(self.artifact.manifest.policy):
            return examples(self.spec, self.tokenizer)
        return read_observations(self.artifact.file(GOLDEN))

    @property
    def tokenizer(self) -> Tokenizer | None:
        return None if self.spec.prompt is None else Tokenizer(self.artifact.file(TOKENIZER), self.spec.prompt)


class OfficialSource:
    """An official checkpoint's folder, or a repository of the hub, which is downloaded."""

    def __init__(self, path: Path, flags: Flags, incomplete: bool = False) -> None:
        self.options = dataclasses.replace(folder.options_of(flags), incomplete=incomplete)
        self.folder: Folder = folder.open_folder(hub.locate(path))
        layout: Layout = reader.layout(self.folder, self.options)
        self.path, self._layout = path, layout
        reader.print_assumptions(layout)
        self.spec, self.towers = layout.spec, layout.towers
        self.tokenizer: Tokenizer | None = tokenizer_of(self.folder, self.options, layout.spec)
        self.digest: str | None = None
        self.quantized = False
        given = {name: str(value) for name, value in dataclasses.asdict(flags).items() if value is not None}
        given |= {"assumed": "; ".join(layout.assumed)} if layout.assumed else {}
        self.normalisation: Recorded = encode(layout.normalisation)
        after = {"normalisation": self.normalisation} if self.normalisation else {}
        origin = HistoryEntry("official", {"source": str(path), **given}, version("rlrc"), None, 0.0, after=after)
        self.history: tuple[HistoryEntry, ...] = (origin,)
        self.unread = list_unread(self.folder.tensors, layout.unused)

    def load(self) -> PolicyModule:
        return replace_spec(reader.read(self.folder, self.options)[0], self.spec)

    @property
    def identity(self) -> str:
        return f"{self.path}, files {', '.join(tensors.states() for tensors in self._tensors)}"

    def check_unchanged(self) -> None:
        for tensors in self._tensors:
            tensors.check_unchanged()

    @cached_property
    def _tensors(self) -> list[Tensors]:
        return list(reader.sources(self.folder, self._layout).values())

    def copy_files(self, draft: Draft) -> None:
        if self.spec.prompt is not None:
            tokenizers.write(tokenizers.of_folder(self.folder, self.options), draft.file(TOKENIZER), self.spec)

    def observations(self) -> dict[str, np.ndarray]:
        return examples(self.spec, self.tokenizer)


def widths(spec: PolicySpec) -> tuple[int, int]:
    """Dimensions of the state and of an action."""
    return 0 if spec.state is None else len(spec.state.names), spec.action.dim


def examples(spec: PolicySpec, tokenizer: Tokenizer | None, seed: int = 0) -> dict[str, np.ndarray]:
    """Random observations for a policy without golden ones, in the form of golden.npz (see artifact_io.py).

    Pictures of coarse random blocks, states within the range of the normalisation, fixed instructions. They compare
    two implementations; they do not measure how well a policy works.
    """
    random, action = np.random.default_rng(seed), spec.action
    values: dict[str, np.ndarray] = {}
    for camera in spec.cameras:
        # If the policy resizes pictures, give them another size and aspect ratio than its own.
        height, width = camera.height, camera.width
        if camera.resize != "none":
            height, width = height + height // 8, width + width // 2
        coarse = random.integers(0, 256, (EXAMPLES, 12, 16, 3), np.uint8)
        down, across = np.arange(height) * 12 // height, np.arange(width) * 16 // width
        values[f"image.{camera.name}"] = coarse[:, down[:, None], across]
    if spec.state is not None:
        center, scale = np.array(spec.state.norm.center), np.array(spec.state.norm.scale)
        values["state"] = (center + scale * random.uniform(-1, 1, (EXAMPLES, len(center)))).astype(np.float32)
    if spec.flow is not None:
        values["noise"] = random.standard_normal((EXAMPLES, action.horizon, spec.flow.width), np.float32)
    if spec.prompt is not None:
        values["instructions"] = np.array(INSTRUCTIONS)
        rows = [{name: array[i] for name, array in values.items()} for i in range(EXAMPLES)]
        ids = [prepare({**row, "instruction": str(row["instructions"])}, spec, tokenizer).ids for row in rows]
        values["ids"] = pad_ids([one for one in ids if one is not None])
    return values


def pad_ids(ids: list[np.ndarray]) -> np.ndarray:
    """Stack prompts of different lengths: (N, L), padded with -1."""
    length = max(map(len, ids))
    return np.stack([np.pad(one, (0, length - len(one)), constant_values=-1) for one in ids])
