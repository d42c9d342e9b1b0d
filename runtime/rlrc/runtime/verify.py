"""Do the graphs on this machine do what the torch policy does? Measured on the artifact's golden.npz, in action units.

golden.npz holds raw observations and what the fp32 torch policy made of them; ``measure`` replays them through the
whole runtime (pictures, tokenizer, graphs, decoding). Bins make the comparison all or nothing: a token that flips to
the next bin is an error of one bin width, one that agrees no error at all. One kind of flip says nothing about the
graphs: where the reference itself prefers its token to the other by less than ``TIE``, the order of floating-point sums
decides. Such a flip is counted, but its action is not held against the tolerance.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rlrc.artifact import ActionSpec, PolicySpec, VerifiedSpec
from rlrc.errors import UserError
from rlrc.runtime.decode import actions_of
from rlrc.runtime.npz import read_npz

if TYPE_CHECKING:
    from rlrc.runtime.policy import LocalPolicy

GOLDEN = "golden.npz"
TIE = 1e-3
"""Logits closer than this are a tie: the reference gives both tokens the same probability to 0.1 %. Graphs that compute
in fp32 differ from torch by about 2e-5 on logits of size 30, fifty times less."""


@dataclass(frozen=True)
class Golden:
    """N observations and the reference's answers; shapes and units as in golden.npz."""

    images: NDArray[np.uint8]  # (N, cameras, H, W, 3)
    state: NDArray[np.float32]  # (N, S), raw
    instructions: NDArray[np.str_]  # (N,)
    ids: NDArray[np.int64]  # (N, L)
    tokens: NDArray[np.int64]  # (N, horizon, dim)
    actions: NDArray[np.float32]  # (N, horizon, dim), un-normalised
    logits: NDArray[np.float32]  # (N, horizon, dim, bins)

    def __len__(self) -> int:
        return len(self.tokens)

    def observation(self, index: int, spec: PolicySpec) -> dict[str, Any]:
        pictures = {f"image.{camera.name}": self.images[index, i] for i, camera in enumerate(spec.cameras)}
        state = {} if spec.state is None else {"state": self.state[index]}
        return pictures | state | {"instruction": str(self.instructions[index])}


def read_golden(path: Path, spec: PolicySpec) -> Golden:
    """Raises UserError unless every array is there and fits the policy, and the answers follow from the logits."""
    arrays, names = read_npz(path), {field.name for field in fields(Golden)}
    if arrays.keys() != names:
        expected, found = ", ".join(sorted(names)), ", ".join(sorted(arrays))
        raise UserError(f"expected {path} to hold {expected}, found {found}; make the artifact again")
    golden = Golden(**arrays)
    action, n = spec.action, len(golden)
    chunk = (n, action.horizon, action.dim)
    shapes = {
        "images": (n, len(spec.cameras), *golden.images.shape[2:4], 3),
        "state": (n, 0 if spec.state is None else len(spec.state.names)),
        "instructions": (n,),
        "ids": (n, spec.prompt.max_tokens),
        "tokens": chunk,
        "actions": chunk,
        "logits": (*chunk, action.bins),
    }
    for name, shape in shapes.items():
        if (found := getattr(golden, name).shape) != shape or n == 0:
            raise UserError(f"expected {name} of shape {shape} in {path}, found {found}; make the artifact again")
    if not np.isfinite(golden.logits).all():
        raise UserError(f"expected finite logits in {path}, found nan or inf; make the artifact again")
    if (golden.logits.argmax(-1) != golden.tokens).any() or (actions_of(golden.tokens, action) != golden.actions).any():
        raise UserError(
            f"expected tokens and actions that follow from the logits in {path}, found others; make the artifact again"
        )
    return golden


def bin_widths(action: ActionSpec) -> NDArray[np.float64]:
    """Width of a bin in action units, per dimension."""
    return 2 / action.bins * np.abs(np.asarray(action.norm.scale))


def default_tolerance(action: ActionSpec) -> float:
    """Half of the narrowest bin, in action units: every token has to agree, ties aside."""
    return float(bin_widths(action).min()) / 2


def measure(policy: LocalPolicy, golden: Golden, tolerance: float) -> VerifiedSpec:
    """Replays the observations one by one, as a robot sends them. Raises NoAction where the graphs give no answer.

    ``max_error`` is per action dimension over all tokens but flips at ties; ``token_flips`` counts every differing
    token, ``gripper_flips`` those of a gripper dimension that cross the middle of its range (``norm.center``);
    ``chunk_jitter`` is the largest amount by which an action's change from one step to the next differs from the
    reference's.
    """
    from rlrc.runtime.backends.onnxruntime import NAME, versions

    action = policy.spec.action
    tokens, actions = np.empty_like(golden.tokens), np.empty_like(golden.actions)
    for i in range(len(golden)):
        observation = golden.observation(i, policy.spec)
        if (ids := policy.ids(observation["instruction"])).tolist() != golden.ids[i].tolist():
            raise UserError(
                f"expected token ids {golden.ids[i].tolist()} for {observation['instruction']!r} as in {GOLDEN}, "
                f"found {ids.tolist()}; put the tokenizer that the policy was trained with into the artifact"
            )
        result = policy.infer(observation)
        tokens[i], actions[i] = result["tokens"], result["actions"]

    flipped = tokens != golden.tokens
    error = np.abs(actions - golden.actions.astype(np.float64))
    middle = np.asarray(action.norm.center)
    gripper = np.asarray([meaning == "gripper" for meaning in action.meaning])
    sides = (actions > middle) != (golden.actions > middle)
    jitter = np.abs(np.diff(actions - golden.actions.astype(np.float64), axis=1))
    return VerifiedSpec(
        backend=NAME,
        observations=len(golden),
        tokens=tokens.size,
        token_flips=int(flipped.sum()),
        gripper_flips=int(sides[..., gripper].sum()),
        max_error=tuple(np.where(flipped & at_tie(golden.logits, tokens), 0, error).max((0, 1)).tolist()),
        chunk_jitter=float(jitter.max(initial=0)),
        tolerance=tolerance,
        versions=versions(),
    )


def at_tie(logits: NDArray[np.float32], tokens: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Reference logits (..., bins), other tokens (...) -> where the reference puts them within ``TIE`` of its best."""
    chosen = np.take_along_axis(logits, tokens[..., None], -1)[..., 0]
    return logits.max(-1) - chosen < TIE


def failure(record: VerifiedSpec) -> str | None:
    """Why a record does not allow its graphs to be run, in a line; None if it does."""
    if record.observations < 1 or not record.max_error:
        return "a record of no observations"
    if all(error <= record.tolerance for error in record.max_error):  # false for nan
        return None
    return f"an error of {max(record.max_error):.3g} in action units where {record.tolerance:.3g} is tolerated"
