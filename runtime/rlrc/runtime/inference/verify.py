"""Compares the graphs on this machine with the torch policy, on the artifact's golden.npz, in action units.

golden.npz holds raw observations and the fp32 torch policy's outputs for them (the reference). ``measure`` replays them
through the whole runtime: pictures, tokenizer, graphs, decoding. With bins, an action agrees exactly or is off by at
least one bin width. A flipped token is excused where the reference prefers its own token by less than ``TIE``: there
the order of floating-point sums decides. Such flips are counted, but do not count as errors. Continuous actions have
the tolerance of bins of 1/256 of their range. Precisions that round more than the order of sums does have a tolerance
relative to each dimension's range, on 99 % of the observations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rlrc.artifact import GOLDEN, ActionSpec, Artifact, PolicySpec, VerifiedSpec
from rlrc.artifact.precisions import find_precision
from rlrc.errors import UserError
from rlrc.npz import read_npz
from rlrc.runtime.inference.backends.engine import Engine
from rlrc.runtime.inference.decode import logit_row, logit_rows, tokens_to_actions

TIE = 1e-3
"""Logits closer than this are a tie: the reference gives both tokens the same probability to 0.1 %. Graphs that compute
in fp32 differ from torch by about 2e-5 on logits of size 30, fifty times less."""
SPACING = {"fp16": 2.0**-10, "int4": 2.0**-10, "bf16": 2.0**-7}
"""The relative spacing of numbers in these precisions: closer logits are a tie. On the reference policy, fp16 flipped
tokens whose logits of about 20 differed by up to 0.0014, and bf16 by up to 0.043."""
ONE_IN = 100  # one observation in so many may exceed a tolerance relative to the range
FINE = 256
"""The number of bins by which continuous actions are measured: that of OpenVLA's action tokens."""
NARROW, RESOLVED = 1e-5, 2.0**-14
"""A dimension with a smaller range, in action units or relative to its center, counts as constant. If a dimension never
moves in the data, its deviation or range is zero, which normalisation replaces by 1e-8 to 1e-6. Below 2^-14 of the
center, bins are at most two float32 steps wide."""


@dataclass(frozen=True)
class Golden:
    """N observations and the reference's outputs; None for inputs and outputs that the policy does not have.

    golden.npz has the same names, with the pictures of each camera as ``image.<camera>``.
    """

    images: dict[str, NDArray[np.uint8]]  # (N, H, W, 3) by camera, raw; an optional one may be missing
    actions: NDArray[np.float32]  # (N, horizon, dim), un-normalised
    state: NDArray[np.float32] | None = None  # (N, S), raw
    instructions: NDArray[np.str_] | None = None  # (N,)
    ids: NDArray[np.int64] | None = None  # (N, L); shorter prompts that are not padded end with -1
    noise: NDArray[np.float32] | None = None  # (N, horizon, width) of flow policies
    tokens: NDArray[np.int64] | None = None  # (N, horizon, dim): bins, or ids of the vocabulary
    logits: NDArray[np.float32] | None = None  # (N, horizon, dim, rows)

    def __len__(self) -> int:
        return len(self.actions)

    def rows(self, indices: Sequence[int] | NDArray[np.integer]) -> Golden:
        """The golden set with only these observations."""
        arrays = {name: array[indices] for name, array in vars(self).items() if isinstance(array, np.ndarray)}
        return replace(self, images={name: pictures[indices] for name, pictures in self.images.items()}, **arrays)

    def observation(self, index: int, spec: PolicySpec) -> dict[str, Any]:
        """One observation, as policies take it."""
        values: dict[str, Any] = {
            f"image.{camera.name}": self.images[camera.name][index]
            for camera in spec.cameras
            if camera.name in self.images
        }
        if self.state is not None:
            values["state"] = self.state[index]
        if self.instructions is not None:
            values["instruction"] = str(self.instructions[index])
        if self.noise is not None:
            values["noise"] = self.noise[index]
        return values


def read_golden(path: Path, spec: PolicySpec) -> Golden:
    """Raises UserError if an array is missing or does not fit the policy, or actions do not follow from the logits."""
    arrays, shapes = read_npz(path), _shapes(spec)
    needed = shapes.keys() - {f"image.{camera.name}" for camera in spec.cameras if camera.optional}
    if not needed <= arrays.keys() <= shapes.keys():
        expected, found = ", ".join(sorted(shapes)), ", ".join(sorted(arrays))
        raise UserError(f"expected {path} to hold {expected}, found {found}; make the artifact again")
    n = max(1, arrays["actions"].shape[0] if arrays["actions"].ndim else 0)
    for name in (name for name in shapes if name in arrays):
        array, wanted = arrays[name], (n, *shapes[name])
        fits = array.ndim == len(wanted) and all(w in (None, f) for f, w in zip(array.shape, wanted, strict=True))
        if not fits:
            shape = f"({', '.join('any' if size is None else str(size) for size in wanted)})"
            raise UserError(f"expected {name} of shape {shape} in {path}, found {array.shape}; make the artifact again")
    images = {name.removeprefix("image."): array for name, array in arrays.items() if name.startswith("image.")}
    golden = Golden(images, **{name: array for name, array in arrays.items() if not name.startswith("image.")})
    if golden.tokens is not None and golden.logits is not None:
        _check_outputs(golden.tokens, golden.logits, golden.actions, spec.action, path)
    elif not np.isfinite(golden.actions).all():
        raise UserError(f"expected finite actions in {path}, found nan or inf; make the artifact again")
    return golden


def _shapes(spec: PolicySpec) -> dict[str, tuple[int | None, ...]]:
    """Shapes of golden.npz after the first dimension; None: any."""
    action = spec.action
    chunk = (action.horizon, action.dim)
    shapes: dict[str, tuple[int | None, ...]] = {"actions": chunk}
    shapes |= {f"image.{camera.name}": (None, None, 3) for camera in spec.cameras}
    if spec.state is not None:
        shapes["state"] = (len(spec.state.names),)
    if spec.prompt is not None:
        shapes |= {"instructions": (), "ids": (None if spec.prompt.pad_id is None else spec.prompt.max_tokens,)}
    if spec.flow is not None:
        shapes["noise"] = (action.horizon, spec.flow.width)
    if action.bins:
        shapes |= {"tokens": chunk, "logits": (*chunk, logit_rows(action))}
    return shapes


def _check_outputs(
    tokens: NDArray[np.int64], logits: NDArray[np.float32], actions: NDArray[np.float32], action: ActionSpec, path: Path
) -> None:
    if not np.isfinite(logits).all():
        raise UserError(f"expected finite logits in {path}, found nan or inf; make the artifact again")
    # The reference may round its actions differently, by much less than a bin.
    rounding = 1e-3 * bin_widths(action) + 1e-6 * np.abs(np.asarray(action.norm.center))
    follows = np.abs(tokens_to_actions(tokens, action).astype(np.float64) - actions) <= rounding
    if (logits.argmax(-1) != logit_row(tokens, action)).any() or not follows.all():
        raise UserError(
            f"expected tokens and actions that follow from the logits in {path}, found others; make the artifact again"
        )


def bin_widths(action: ActionSpec) -> NDArray[np.float64]:
    """Width of a bin in action units, per dimension; continuous actions count as having ``FINE`` bins."""
    return action_range(action) / (action.bins or FINE)


def action_range(action: ActionSpec) -> NDArray[np.float64]:
    """Width of the normalised range [-1, 1] in action units, per dimension; at least what float32 resolves there."""
    return np.maximum(_nominal_range(action), _narrowest_range(action))


def _nominal_range(action: ActionSpec) -> NDArray[np.float64]:
    return 2 * np.abs(np.asarray(action.norm.scale, np.float64))


def _narrowest_range(action: ActionSpec) -> NDArray[np.float64]:
    return np.maximum(NARROW, RESOLVED * np.abs(np.asarray(action.norm.center, np.float64)))


@dataclass(frozen=True)
class Tolerances:
    """How far actions may be from the reference's: by ``of_range`` if it is set, else by ``tolerance``."""

    tolerance: float
    """in action units, for every observation"""
    of_range: float | None = None
    """as a fraction of a dimension's range, for 99 % of the observations"""
    spacing: float = 0.0
    """relative difference of logits that also counts as a tie, besides ``TIE``"""


def default_tolerances(action: ActionSpec, precision: str | None = None) -> Tolerances:
    """Half of the narrowest bin, so that all tokens must agree except at ties.

    With a ``precision`` that rounds: 2 % of the range for 4-bit weights (against the policy with these weights), else
    1 %. Constant dimensions do not count for the narrowest bin, unless all are constant: graphs cannot move them by
    more than their own range.
    """
    moving = _nominal_range(action) >= _narrowest_range(action)
    half = float(bin_widths(action)[moving if moving.any() else ...].min()) / 2
    if precision is None:
        return Tolerances(half)
    rounded = find_precision(precision)
    return Tolerances(half, rounded.range_tolerance, rounded.spacing)


def recorded_tolerances(record: VerifiedSpec) -> Tolerances:
    """The tolerances of a verification record."""
    return Tolerances(record.tolerance, record.range_tolerance, record.spacing)


@dataclass(frozen=True)
class ReplayOutputs:
    """The graphs' outputs for N observations."""

    actions: NDArray[np.float64]  # (N, horizon, dim)
    tokens: NDArray[np.int64] | None  # the same shape, or None


class GraphPolicy(Protocol):
    """The interface of rlrc.runtime.inference.policy.LocalPolicy that verification uses."""

    artifact: Artifact
    spec: PolicySpec
    backend: str
    engine: Engine

    def infer(self, observation: Mapping[str, Any]) -> Mapping[str, Any]: ...
    def ids(self, observation: Mapping[str, Any]) -> NDArray[np.int64] | None: ...
    def reset(self) -> None: ...


def replay(policy: GraphPolicy, golden: Golden) -> ReplayOutputs:
    """Infers one observation after the other, as on a robot. Raises NoAction where the outputs are not valid."""
    results = []
    for i in range(len(golden)):
        observation = golden.observation(i, policy.spec)
        if golden.ids is not None:
            _check_ids(policy.ids(observation), golden.ids[i], observation["instruction"])
        results.append(policy.infer(observation))
    actions = np.stack([result["actions"] for result in results]).astype(np.float64)
    tokens = None if golden.tokens is None else np.array([result["tokens"] for result in results])
    return ReplayOutputs(actions, tokens)


def measure(policy: GraphPolicy, golden: Golden, limits: Tolerances) -> VerifiedSpec:
    """Replays the golden observations and compares the outputs."""
    return compare(policy, replay(policy, golden), golden, limits)


def compare(policy: GraphPolicy, outputs: ReplayOutputs, golden: Golden, limits: Tolerances) -> VerifiedSpec:
    """The record of how the outputs differ from the reference's (fields: rlrc.artifact.spec.VerifiedSpec).

    ``gripper_flips`` counts actions of a gripper dimension on the other side of the middle of its range
    (``norm.center``); ``chunk_jitter`` is the largest difference from the reference in an action's change from one step
    to the next.
    """
    spec = policy.spec
    error = errors(spec, outputs, golden, limits)
    middle = np.asarray(spec.action.norm.center)
    gripper = np.asarray([meaning == "gripper" for meaning in spec.action.meaning])
    sides = (outputs.actions > middle) != (golden.actions > middle)
    jitter = np.abs(np.diff(outputs.actions - golden.actions.astype(np.float64), axis=1))
    return VerifiedSpec(
        backend=policy.backend,
        observations=len(golden),
        tokens=0 if outputs.tokens is None else outputs.tokens.size,
        token_flips=0 if outputs.tokens is None else int((outputs.tokens != golden.tokens).sum()),
        gripper_flips=int(sides[..., gripper].sum()),
        max_error=tuple(error.max((0, 1)).tolist()),
        range_error=tuple((_without_worst_percent(error.max(1)) / action_range(spec.action)).tolist()),
        chunk_jitter=float(jitter.max(initial=0)),
        tolerance=limits.tolerance,
        range_tolerance=limits.of_range,
        spacing=limits.spacing,
        versions=policy.engine.versions(),
    )


def errors(spec: PolicySpec, outputs: ReplayOutputs, golden: Golden, limits: Tolerances) -> NDArray[np.float64]:
    """Absolute differences (N, horizon, dim), zero for excused tokens."""
    error: NDArray[np.float64] = np.abs(outputs.actions - golden.actions.astype(np.float64))
    if outputs.tokens is None or golden.logits is None:
        return error
    return np.where(mask_ties(outputs.tokens, golden, spec, limits.spacing), 0, error)


def worst_observation(
    spec: PolicySpec, outputs: ReplayOutputs, golden: Golden, limits: Tolerances
) -> dict[str, NDArray[Any]]:
    """The observation with the largest error, as ``rlrc infer`` reads it, with both chunks of actions."""
    parts = errors(spec, outputs, golden, limits) / action_range(spec.action)
    index = int(np.nan_to_num(parts, nan=np.inf).max((1, 2)).argmax())
    observation = {name: np.asarray(value) for name, value in golden.observation(index, spec).items()}
    return observation | {"expected": golden.actions[index], "found": outputs.actions[index]}


def _without_worst_percent(error: NDArray[np.float64]) -> NDArray[np.float64]:
    """(N, dim) -> the largest of each dimension (dim,), without its worst N // 100 observations."""
    ranked = np.sort(error, 0)  # nan sorts last
    largest: NDArray[np.float64] = ranked[len(ranked) - 1 - len(ranked) // ONE_IN]
    return largest


def _check_ids(found: NDArray[np.int64] | None, golden: NDArray[np.int64], instruction: str) -> None:
    expected = golden[golden >= 0].tolist()
    if found is None or found.tolist() != expected:
        raise UserError(
            f"expected token ids {expected} for {instruction!r} as in {GOLDEN}, "
            f"found {None if found is None else found.tolist()}; "
            "use the tokenizer that the policy was trained with in the artifact"
        )


def mask_ties(tokens: NDArray[np.int64], golden: Golden, spec: PolicySpec, spacing: float) -> NDArray[np.bool_]:
    """Where (N, horizon, dim) tokens that differ from the reference's are excused: at ties of the reference.

    In autoregressive decoding also all later tokens, since they continue a different sequence.
    """
    assert golden.tokens is not None
    assert golden.logits is not None
    rows = logit_row(tokens, spec.action)
    tied: NDArray[np.bool_] = (tokens != golden.tokens) & is_tie(golden.logits, rows, spacing)
    if spec.decode == "autoregressive":
        tied = np.logical_or.accumulate(tied.reshape(len(tied), -1), 1).reshape(tied.shape)
    return tied


def is_tie(logits: NDArray[np.float32], rows: NDArray[np.integer], spacing: float = 0.0) -> NDArray[np.bool_]:
    """Reference logits (..., rows) and chosen rows (...) -> where the choice is within ``TIE`` of the best logit.

    ``spacing``, relative to the best logit, widens that.
    """
    chosen, best = np.take_along_axis(logits, rows[..., None], -1)[..., 0], logits.max(-1)
    tied: NDArray[np.bool_] = best - chosen < np.maximum(TIE, spacing * np.abs(best))
    return tied


def failure_reason(record: VerifiedSpec) -> str | None:
    """Why a record does not allow its graphs to run, in one line; None if it does."""
    if record.observations < 1 or not record.max_error:
        return "a record without observations"
    if record.range_tolerance is not None:
        if all(error <= record.range_tolerance for error in record.range_error):  # false for nan
            return None
        error, limit = max(record.range_error, default=np.nan), record.range_tolerance
        return f"an error of {error:.2%} of the range where {limit:.2%} is tolerated on 99 % of the observations"
    if all(error <= record.tolerance for error in record.max_error):
        return None
    return f"an error of {max(record.max_error):.3g} in action units where {record.tolerance:.3g} is tolerated"
