"""Decoding: from image tokens, ids and state to a chunk of actions, by the graphs after "vision".

Every decoder takes ``run(graph, tensors)``, which passes a graph those tensors that it has inputs for and returns its
outputs by name. ``parallel`` runs a graph once; ``autoregressive`` once per token, while the engine caches keys and
values; ``flow`` runs one graph once and a second one per step. ``inputs`` hold ``image_tokens`` (B, N, width) and,
where the policy has them, ``ids`` (B, L) and ``state`` (B, S).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rlrc.artifact import ActionSpec, FlowSpec
from rlrc.runtime.inference.continuation import Continuation
from rlrc.runtime.inference.preprocess import bin_centers, normalise, to_bins, unnormalise

Tensors = Mapping[str, NDArray[Any]]
Run = Callable[[str, Tensors], Tensors]


class NoAction(RuntimeError):
    """The graphs' outputs are not a valid action. The robot gets none; the message says why."""


class Decoded(NamedTuple):
    """A batch of chunks (B, horizon, dim): ``actions`` float32, un-normalised; ``tokens`` int64 where there are any."""

    actions: NDArray[np.float32]
    tokens: NDArray[np.int64] | None = None


def parallel(run: Run, inputs: Tensors, action: ActionSpec, continuation: Continuation | None = None) -> Decoded:
    """The whole chunk from one pass: tokens, or continuous actions (OpenVLA-OFT, arXiv 2502.19645, section 4).

    A continuation's frozen actions replace the decoded ones; the others do not depend on them. Raises NoAction for
    outputs that are not finite or have another shape.
    """
    chunk = (action.horizon, action.dim)
    if not action.bins:
        actions = _unnormalise_checked(_get_output(run("decoder", inputs), "actions", chunk), action)
        if continuation is not None:
            actions[:, : continuation.frozen] = continuation.sent
        return Decoded(actions)
    tokens = _best_tokens(_get_output(run("decoder", inputs), "logits", (*chunk, logit_rows(action))), action)
    if continuation is not None:
        tokens[:, : continuation.frozen] = actions_to_tokens(continuation.sent, action)
    return Decoded(tokens_to_actions(tokens, action), tokens)


def autoregressive(run: Run, inputs: Tensors, action: ActionSpec, continuation: Continuation | None = None) -> Decoded:
    """Greedy decoding, one token per pass; the engine caches keys and values (OpenVLA, arXiv 2406.09246).

    ``start`` and ``end``, int64 (1,), are the positions that a pass computes; a start of 0 begins a new sequence. The
    first pass takes the image tokens and all ids, later ones no image tokens and the last id. A continuation's frozen
    actions are forced, and later tokens are conditioned on them. Raises NoAction as ``parallel`` does.
    """
    tokens: list[NDArray[np.int64]] = []
    forced: list[int] = []
    if continuation is not None:
        forced = actions_to_tokens(continuation.sent, action).ravel().tolist()
    fed, start, end = dict(inputs), 0, inputs["image_tokens"].shape[1] + inputs["ids"].shape[1]
    while len(tokens) < action.horizon * action.dim:
        outputs = run("decoder", {**fed, "start": np.array([start]), "end": np.array([end])})
        best = _best_tokens(_get_output(outputs, "logits", (logit_rows(action),)), action)
        tokens.append(best if len(tokens) >= len(forced) else np.full_like(best, forced[len(tokens)]))
        fed |= {"image_tokens": inputs["image_tokens"][:, :0], "ids": tokens[-1][:, None]}
        start, end = end, end + 1
    chunk = np.stack(tokens, 1).reshape(-1, action.horizon, action.dim)
    return Decoded(tokens_to_actions(chunk, action), chunk)


def flow(
    run: Run,
    inputs: Tensors,
    action: ActionSpec,
    flow: FlowSpec,
    noise: NDArray[np.float32],
    continuation: Continuation | None = None,
) -> Decoded:
    """Euler steps from ``noise`` (B, horizon, width) at t = 1 to actions at t = 0 (pi0, arXiv 2410.24164, section IV).

    "prefix" runs once and returns the keys and values of all but the actions. "step" returns the velocity from these,
    ``x`` and the time, given as ``t`` (B,) and as the step's number, ``step`` (B,). A continuation is blended in before
    every step, and its frozen actions once more at the end. Raises NoAction as ``parallel`` does.
    """
    known, x = {**inputs, **run("prefix", inputs)}, noise
    for i in range(flow.steps):
        if continuation is not None:
            x = continuation.inpaint(x, noise, 1 - i / flow.steps, action)
        t, step = np.full(len(x), 1 - i / flow.steps, np.float32), np.full(len(x), i, np.int64)
        velocity = run("step", {**known, "x": x, "t": t, "step": step})
        x = x - _get_output(velocity, "velocity", (action.horizon, flow.width)) / np.float32(flow.steps)
    if continuation is not None:
        x = continuation.without_future().inpaint(x, noise, 0.0, action)
    return Decoded(_unnormalise_checked(x[..., : action.dim], action))


def logit_rows(action: ActionSpec) -> int:
    """The number of tokens that the logits cover."""
    return action.bins if action.tokens is None else action.tokens.rows


def logit_row(tokens: NDArray[np.integer], action: ActionSpec) -> NDArray[np.integer]:
    """The index of a token in the logits."""
    return tokens if action.tokens is None else tokens - action.tokens.offset


def tokens_to_actions(tokens: NDArray[np.integer], action: ActionSpec) -> NDArray[np.float32]:
    """Tokens (..., dim), bins or ids of a vocabulary -> un-normalised actions of the same shape."""
    bins = tokens if action.tokens is None else np.clip(action.tokens.first - tokens, 0, action.bins - 1)
    return unnormalise(bin_centers(action.bins)[bins], action.norm)


def actions_to_tokens(actions: NDArray[np.floating], action: ActionSpec) -> NDArray[np.int64]:
    """Un-normalised actions (..., dim) -> the tokens that represent them: the inverse of ``tokens_to_actions``."""
    bins = to_bins(normalise(actions, action.norm), action.bins)
    return bins if action.tokens is None else action.tokens.first - bins


def _get_output(outputs: Tensors, name: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """The output (B, *shape). Raises NoAction if it has another shape."""
    if outputs[name].shape[1:] != shape:
        raise NoAction(f"expected {name} (B, {', '.join(map(str, shape))}), found {outputs[name].shape}")
    return outputs[name]


def _best_tokens(logits: NDArray[np.floating], action: ActionSpec) -> NDArray[np.int64]:
    """The most likely tokens; the first where several are equal."""
    _check_finite(logits, "logits")
    rows: NDArray[np.int64] = logits.argmax(-1)
    return rows if action.tokens is None else rows + action.tokens.offset


def _unnormalise_checked(normalised: NDArray[np.floating], action: ActionSpec) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):  # becomes infinite, which _check_finite refuses
        actions = unnormalise(normalised, action.norm)
    _check_finite(actions, "actions")
    return actions


def _check_finite(values: NDArray[np.floating], name: str) -> None:
    if not np.isfinite(values).all():
        raise NoAction(f"expected finite {name}, found {np.count_nonzero(~np.isfinite(values))} nan or inf")
