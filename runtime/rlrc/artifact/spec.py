"""The manifest's types: the policy, its towers, quantization, graphs, verification records and history."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

FORMAT_VERSION = 1


@dataclass(frozen=True)
class NormStats:
    """Per-dimension affine normalisation: ``normalised = (raw - center) / scale``, clipped to ``[-clip, clip]`` if set.

    Mean/std statistics are (mean, std); min/max or quantiles are ((high + low) / 2, (high - low) / 2); (0, 1) leaves a
    dimension unchanged.
    """

    center: tuple[float, ...]
    scale: tuple[float, ...]
    clip: float | None = None


@dataclass(frozen=True)
class CameraSpec:
    """The policy's input is ``(picture / 255 - mean) / std``, float32 (height, width, C) or (C, height, width).

    ``mean`` and ``std`` have three numbers per vision encoder; the colour channels are repeated for each encoder.
    ``resize``: "none" refuses a picture of any other size; "bilinear" and "bicubic" are PIL's, with anti-aliasing;
    "pad" and "pad-left-top" keep the proportions (bilinear on floats, no anti-aliasing) and fill the rest with black,
    on all sides or on the left and top only. An ``optional`` camera may be missing; its tokens are then left out.
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
    """Proprioception: name and unit of every dimension, and the normalisation.

    The policy's input is padded with zeros to ``width`` numbers (None: not padded).
    """

    names: tuple[str, ...]
    units: tuple[str, ...]
    norm: NormStats
    width: int | None = None


@dataclass(frozen=True)
class PromptSpec:
    """How an instruction becomes ids: edit, fill ``template``, tokenize, append ``suffix``, pad on the right.

    ``edits``, in order: "lower" case; "strip" white space at both ends; "blanks" for underscores and line ends;
    "newline" at the end if there is none. In the template, ``{instruction}`` and ``{state}`` are replaced. The state is
    normalised, padded with zeros to ``state_width`` numbers (0: not padded), and written as the numbers of
    ``state_bins`` equal bins over [-1, 1]; the policy then has no other state input. ``suffix`` is appended unless the
    ids already end with it. A prompt longer than ``max_tokens`` is truncated (``truncate``) or refused. ``pad_id``
    None: not padded. ``known``: tokens with their ids, to check that the tokenizer has the right vocabulary.
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

    Any other token is taken as the nearest bin (OpenVLA, arXiv 2406.09246, section 3.2).
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

    ``tokens``: the vocabulary's tokens that represent the bins (None: the logits are over the bins).
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
    """A policy's inputs and outputs. ``geometry``: the family's own values (patch sizes, ...), which it checks."""

    family: str
    decode: Literal["parallel", "autoregressive", "flow"]
    cameras: tuple[CameraSpec, ...]
    state: StateSpec | None
    prompt: PromptSpec | None  # None: a policy for one task, without language
    action: ActionSpec
    geometry: dict[str, Any]
    flow: FlowSpec | None = None


@dataclass(frozen=True)
class LayerSpec:
    """One transformer block: attention heads, key/value heads, size of a head, width of the MLP.

    A "cross" block attends only to another tower's keys and values. A "half" block computes only keys and values: the
    last block of a prefix, whose output is not used.
    """

    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    kind: Literal["self", "cross", "half"] = "self"

    @property
    def kv_only(self) -> bool:
        """Whether the block makes keys and values and nothing else (stored as "half")."""
        return self.kind == "half"


@dataclass(frozen=True)
class TowerSpec:
    """A stack of transformer blocks with ``width`` channels; every block may have its own shape.

    ``eps`` of the norms; ``activation`` of the MLPs (None: SiLU in decoders, GELU in vision transformers); ``theta`` of
    the rotary positions; ``norm_offset`` is added to the norms' weights (Gemma stores them minus one). ``norm``
    "adaptive": modulated by the flow's time; "steps": the modulation is tabulated for the fixed flow steps.
    """

    width: int
    layers: tuple[LayerSpec, ...]
    eps: float = 1e-5
    activation: Literal["silu", "gelu", "gelu-tanh", "relu"] | None = None
    theta: float = 10_000.0
    norm: Literal["rms", "adaptive", "steps"] = "rms"
    norm_offset: float = 0.0

    @property
    def tabulated(self) -> bool:
        """Whether the norms look their modulation up in a table of the flow steps (stored as "steps")."""
        return self.norm == "steps"


@dataclass(frozen=True)
class QuantizationSpec:
    """Symmetric integers with an fp16 scale per group of inputs.

    A group has ``group`` inputs, or half of that (and so on, down to 32) if the input dimension is not a multiple.
    ``tensors``: the bits, 4 or 8, of every quantized tensor by name. ``grid``: the bits of most weights.
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
    """A graph file that the runtime loads. ``needs``: the engine's version, such as {"onnxruntime": ">=1.18"}."""

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

    ``max_error`` is per action dimension, without flips at ties of the reference; ``token_flips`` counts differing
    tokens among ``tokens``; ``chunk_jitter`` is the largest step-to-step difference that the graphs add within a chunk.
    ``range_error``: per dimension, as a fraction of its range, without the worst 1 % of the observations. The limit is
    ``tolerance`` for ``max_error``, or ``range_tolerance`` for ``range_error`` if it is set. ``spacing``: logits of the
    reference within this relative distance of its best also count as ties.
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
    """One stage: its full configuration, rlrc's version, the hash of the parent's manifest, its cost and metrics.

    ``precision``: the precision of its matrix products, by type of device; ``device``: where torch computed.
    """

    stage: str
    config: dict[str, Any]
    version: str
    parent: str | None
    cpu_minutes: float
    before: dict[str, Any] = field(default_factory=dict)
    after: dict[str, Any] = field(default_factory=dict)
    precision: dict[str, str] = field(default_factory=dict)
    device: str = ""


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
