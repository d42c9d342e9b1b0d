"""What an official folder describes: a policy's geometry, where its tensors are, how its values are normalised."""

from __future__ import annotations

from dataclasses import dataclass, field

from rlrc.artifact import PolicySpec, TowerSpec


@dataclass(frozen=True)
class TensorOrigin:
    """Where a tensor of the policy comes from in an official folder, and so how it is written back.

    ``convert`` "same"; "join": the official tensors one after the other (q, k, v -> qkv); "patches": a convolution
    (out, colours, rows, columns) -> (out, rows * columns * colours); "flat": without leading dimensions of 1, one after
    the other (class token (1, 1, D), registers (1, R, D) -> (1 + R, D)); "query", "key", "value": the first, second,
    last third of one tensor (three parts are then of the same official tensor, and stand in this order).
    """

    names: tuple[str, ...]
    convert: str = "same"
    file: str = ""  # another file than the model's safetensors: an official ``.pt``


@dataclass(frozen=True)
class Normalisation:
    """How one input or output is normalised, for ``rlrc inspect`` and the history of artifacts.

    ``feature``: its name in the statistics of its data set. ``origin``: which statistics of which file; for IDENTITY,
    what says so. ``group``: the data set that --unnorm-key chose. ``missing``: what there is instead of statistics, and
    ``groups``: the data sets that it could choose.
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
    """A policy of a family, before its weights are read: what it is, where its tensors are, what it never reads."""

    spec: PolicySpec
    towers: dict[str, TowerSpec]
    origins: dict[str, TensorOrigin] = field(default_factory=dict)  # by the name of the policy's tensor
    unused: tuple[str, ...] = ()  # official tensors that no action depends on
    assumed: tuple[str, ...] = ()  # what the folder does not say and was concluded from its contents, and the flag
    # How inputs ("image.top", "state") and the action are normalised, first what is nearest to the raw values.
    normalisation: dict[str, tuple[Normalisation, ...]] = field(default_factory=dict)
