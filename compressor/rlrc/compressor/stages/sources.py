"""What a stage starts from: an artifact, or a checkpoint in an official format, which need not become one first."""

from __future__ import annotations

import dataclasses
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import numpy as np
from torch import Tensor

from rlrc import artifact as artifacts
from rlrc.artifact import GOLDEN, TOKENIZER, WEIGHTS, Artifact, Draft, HistoryEntry, PolicySpec, TowerSpec
from rlrc.artifact.describe import Recorded, recorded_normalisation
from rlrc.checkpoint_folder import Flags, is_checkpoint
from rlrc.compressor.checkpoints import folder, hub, reader, tokenizers
from rlrc.compressor.checkpoints.folder import Folder
from rlrc.compressor.checkpoints.layout import Layout
from rlrc.compressor.checkpoints.torch_policy import tokenizer_of
from rlrc.compressor.models.meta import build_on_meta
from rlrc.compressor.models.policy import PolicyModule
from rlrc.compressor.models.weights import policy_of
from rlrc.compressor.prune.lossless import Cut, never_read
from rlrc.compressor.stages.artifact_io import CURVES, load_policy, read_observations
from rlrc.errors import UserError
from rlrc.runtime.inference.preprocess import Tokenizer, prepare
from rlrc.strict import encode

INSTRUCTIONS = ("pick up the red cube", "close the drawer", "put the spoon on the towel", "open the box on the left")
EXAMPLES = len(INSTRUCTIONS)


class PolicySource(Protocol):
    """``digest`` and ``history`` are those of an artifact; an official folder's history says where it came from."""

    spec: PolicySpec
    towers: dict[str, TowerSpec]
    digest: str | None
    history: tuple[HistoryEntry, ...]
    quantized: bool
    normalisation: Recorded  # how inputs and actions are normalised, as far as it is known
    unread: list[Cut]  # what an official folder has that no action depends on

    def load(self) -> PolicyModule: ...

    def hand_on(self, draft: Draft) -> None:
        """The tokenizer, and the curves of earlier stages."""

    def observations(self) -> dict[str, np.ndarray]:
        """The raw ones of golden.npz."""
        ...

    @property
    def tokenizer(self) -> Tokenizer | None:
        """That of the policy's prompt; None: a policy without language."""
        ...


def open_source(path: Path, flags: Flags, incomplete: bool = False) -> PolicySource:
    """Reads no weights yet. ``incomplete``: statistics may be missing, for the caller supplies them.

    Raises UserError for what a stage cannot start from.
    """
    return (
        OfficialSource(path, flags, incomplete) if is_checkpoint(path, flags) else ArtifactSource(artifacts.load(path))
    )


def respecified(policy: PolicyModule, spec: PolicySpec) -> PolicyModule:
    """The policy's weights under another description of what it sees and does."""
    if policy.spec == spec:
        return policy
    return policy_of(spec, policy.towers, policy.state_dict(), "the policy")


def unquantized_only(found: PolicySource, path: str | Path) -> None:
    """Raises UserError for weights that were rounded before: every stage would store them as floats, or round twice."""
    if found.quantized:
        raise UserError(
            f"expected an unquantized artifact, found int4 or int8 in {path}; start from the one that it was quantized "
            "from, and quantize last"
        )


def shapes(source: PolicySource) -> dict[str, Tensor]:
    """The policy's tensors, without data."""
    return build_on_meta(source.spec, source.towers).state_dict()


class ArtifactSource:
    def __init__(self, artifact: Artifact) -> None:
        if WEIGHTS not in artifact.manifest.files:
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
        return respecified(load_policy(self.artifact), self.spec)

    def hand_on(self, draft: Draft) -> None:
        draft.inherit(self.artifact, TOKENIZER, CURVES)

    def observations(self) -> dict[str, np.ndarray]:
        if widths(self.spec) != widths(self.artifact.manifest.policy):
            return examples(self.spec, self.tokenizer)
        return read_observations(self.artifact.file(GOLDEN))

    @property
    def tokenizer(self) -> Tokenizer | None:
        return None if self.spec.prompt is None else Tokenizer(self.artifact.file(TOKENIZER), self.spec.prompt)


class OfficialSource:
    """An official folder, or a repository of the hub, which is downloaded."""

    def __init__(self, path: Path, flags: Flags, incomplete: bool = False) -> None:
        self.options = dataclasses.replace(folder.options_of(flags), incomplete=incomplete)
        self.folder: Folder = folder.open_folder(hub.locate(path))
        layout: Layout = reader.layout(self.folder, self.options)
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
        self.unread = never_read(self.folder.tensors, layout.unused)

    def load(self) -> PolicyModule:
        return respecified(reader.read(self.folder, self.options)[0], self.spec)

    def hand_on(self, draft: Draft) -> None:
        if self.spec.prompt is not None:
            tokenizers.write(tokenizers.of_folder(self.folder, self.options), draft.file(TOKENIZER), self.spec)

    def observations(self) -> dict[str, np.ndarray]:
        return examples(self.spec, self.tokenizer)


def widths(spec: PolicySpec) -> tuple[int, int]:
    """Numbers of the state and of an action."""
    return 0 if spec.state is None else len(spec.state.names), spec.action.dim


def examples(spec: PolicySpec, tokenizer: Tokenizer | None, seed: int = 0) -> dict[str, np.ndarray]:
    """Observations for a policy that came without any: see rlrc.compressor.stages.artifact_io for their form.

    Random pictures of coarse blocks, states drawn from where the normalisation expects most of them, fixed
    instructions. They show whether two implementations compute the same, not whether the policy does its job.
    """
    random, action = np.random.default_rng(seed), spec.action
    values: dict[str, np.ndarray] = {}
    for camera in spec.cameras:
        # Another size and other proportions than the policy's, where it resizes at all.
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
        values["ids"] = joined([one for one in ids if one is not None])
    return values


def joined(ids: list[np.ndarray]) -> np.ndarray:
    """Prompts of different lengths -> (N, L), -1 behind the shorter ones."""
    length = max(map(len, ids))
    return np.stack([np.pad(one, (0, length - len(one)), constant_values=-1) for one in ids])
