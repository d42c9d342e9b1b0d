"""What a checkpoint folder describes: the policy's geometry, its tensors, and the normalisation of its values."""

from __future__ import annotations

from dataclasses import dataclass, field

from rlrc.artifact import PolicySpec, TowerSpec


@dataclass(frozen=True)
class TensorOrigin:
    """The tensors of a checkpoint that a tensor of the policy is made of, and the conversion, which write-back inverts.

    ``convert`` "same"; "join": concatenate (q, k, v -> qkv); "patches": a convolution (out, colours, rows, columns) ->
    (out, rows * columns * colours); "flat": drop leading dimensions of 1 and concatenate (class token (1, 1, D),
    registers (1, R, D) -> (1 + R, D)); "query", "key", "value": the first, second or last third of one tensor, which
    three tensors of the policy then share, in this order.
    """

    names: tuple[str, ...]
    convert: str = "same"
    file: str = ""  # "": the model's safetensors; else the name of a ``.pt``


@dataclass(frozen=True)
class Normalisation:
    """How one input or output is normalised, for ``rlrc inspect`` and the history of artifacts.

    ``feature``: its name in the statistics of its data set. ``origin``: the statistics and their file; for IDENTITY the
    setting that requires it. ``group``: the data set that --unnorm-key chose. ``missing``: what was found instead of
    statistics. ``groups``: the data sets that --unnorm-key can choose.
    """

    feature: str
    mode: str
    origin: str = ""
    group: str | None = None
    missing: str = ""
    groups: tuple[str, ...] = ()
    eps: float = 0.0


@dataclass(frozen=True)
class Layout:
    """A policy before its weights are read: its description, the origin of its tensors, and the unused tensors."""

    spec: PolicySpec
    towers: dict[str, TowerSpec]
    origins: dict[str, TensorOrigin] = field(default_factory=dict)  # by the name of the policy's tensor
    unused: tuple[str, ...] = ()  # tensors of the checkpoint that no action depends on
    assumed: tuple[str, ...] = ()  # facts that the folder does not state, each with the flag that overrides it
    # Of the inputs ("image.top", "state") and the action, the step nearest to the raw values first.
    normalisation: dict[str, tuple[Normalisation, ...]] = field(default_factory=dict)
