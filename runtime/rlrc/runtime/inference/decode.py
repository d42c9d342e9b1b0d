"""Decode drivers: from the graphs behind "vision" to a chunk of actions.

A driver is called with ``run(graph, tensors)``, which takes from the tensors what the graph has inputs for and returns
its outputs by name. It runs one graph once (parallel), once a token (autoregressive; the engine keeps the keys and
values) or a second one at every step (flow); it knows neither the engine nor the pictures. ``inputs`` hold
``image_tokens`` (B, N, width) and, where the policy has them, ``ids`` (B, L) and ``state`` (B, S).
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
    """The graphs gave nothing that a sound action could be made of. The robot gets none; the message says why."""


class Decoded(NamedTuple):
    """A batch of chunks (B, horizon, dim): ``actions`` float32, un-normalised; ``tokens`` int64 where there are any."""

    actions: NDArray[np.float32]
    tokens: NDArray[np.int64] | None = None


def parallel(run: Run, inputs: Tensors, action: ActionSpec, continuation: Continuation | None = None) -> Decoded:
    """The whole chunk from one pass: tokens, or actions themselves (OpenVLA-OFT, arXiv 2502.19645, section 4).

    A continuation's frozen actions take the place of those decoded; the others do not depend on them. Raises NoAction
    for outputs that are not finite or do not fit.
    """
    chunk = (action.horizon, action.dim)
    if not action.bins:
        actions = _raw(_shaped(run("decoder", inputs), "actions", chunk), action)
        if continuation is not None:
            actions[:, : continuation.frozen] = continuation.sent
        return Decoded(actions)
    tokens = _best(_shaped(run("decoder", inputs), "logits", (*chunk, logit_rows(action))), action)
    if continuation is not None:
        tokens[:, : continuation.frozen] = actions_to_tokens(continuation.sent, action)
    return Decoded(tokens_to_actions(tokens, action), tokens)


def autoregressive(run: Run, inputs: Tensors, action: ActionSpec, continuation: Continuation | None = None) -> Decoded:
    """Greedy, a token a pass, every pass continuing the keys and values of those before (OpenVLA, arXiv 2406.09246).

    The engine keeps those. ``start`` and ``end``, int64 (1,), say which positions of the sequence a pass computes: from
    0 all is new. The first pass takes the image tokens and all ids, the others no image token and the last id. The
    tokens of a continuation's frozen actions are not chosen but given, and those after them follow from them. Raises
    NoAction as ``parallel``.
    """
    tokens: list[NDArray[np.int64]] = []
    given: list[int] = []
    if continuation is not None:
        given = actions_to_tokens(continuation.sent, action).ravel().tolist()
    fed, start, end = dict(inputs), 0, inputs["image_tokens"].shape[1] + inputs["ids"].shape[1]
    while len(tokens) < action.horizon * action.dim:
        outputs = run("decoder", {**fed, "start": np.array([start]), "end": np.array([end])})
        best = _best(_shaped(outputs, "logits", (logit_rows(action),)), action)
        tokens.append(best if len(tokens) >= len(given) else np.full_like(best, given[len(tokens)]))
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

    "prefix" gives the keys and values of everything but the actions, once; "step" the velocity, from them, ``x`` and
    the time, as ``t`` (B,) or counted in steps, ``step`` (B,). A continuation is painted in before every step, what has
    been sent of it at the end as well. Raises NoAction as ``parallel``.
    """
    known, x = {**inputs, **run("prefix", inputs)}, noise
    for i in range(flow.steps):
        if continuation is not None:
            x = continuation.painted(x, noise, 1 - i / flow.steps, action)
        t, step = np.full(len(x), 1 - i / flow.steps, np.float32), np.full(len(x), i, np.int64)
        velocity = run("step", {**known, "x": x, "t": t, "step": step})
        x = x - _shaped(velocity, "velocity", (action.horizon, flow.width)) / np.float32(flow.steps)
    if continuation is not None:
        x = continuation.only_sent().painted(x, noise, 0.0, action)
    return Decoded(_raw(x[..., : action.dim], action))


def logit_rows(action: ActionSpec) -> int:
    """How many tokens the logits are over."""
    return action.bins if action.tokens is None else action.tokens.rows


def logit_row(tokens: NDArray[np.integer], action: ActionSpec) -> NDArray[np.integer]:
    """Where a token stands in the logits."""
    return tokens if action.tokens is None else tokens - action.tokens.offset


def tokens_to_actions(tokens: NDArray[np.integer], action: ActionSpec) -> NDArray[np.float32]:
    """Tokens (..., dim), bins or ids of a vocabulary -> un-normalised actions of the same shape."""
    bins = tokens if action.tokens is None else np.clip(action.tokens.first - tokens, 0, action.bins - 1)
    return unnormalise(bin_centers(action.bins)[bins], action.norm)


def actions_to_tokens(actions: NDArray[np.floating], action: ActionSpec) -> NDArray[np.int64]:
    """Un-normalised actions (..., dim) -> the tokens that stand for them: the inverse of ``tokens_to_actions``."""
    bins = to_bins(normalise(actions, action.norm), action.bins)
    return bins if action.tokens is None else action.tokens.first - bins


def _shaped(outputs: Tensors, name: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """The output (B, *shape). Raises NoAction if it has another shape."""
    if outputs[name].shape[1:] != shape:
        raise NoAction(f"expected {name} (B, {', '.join(map(str, shape))}), found {outputs[name].shape}")
    return outputs[name]


def _best(logits: NDArray[np.floating], action: ActionSpec) -> NDArray[np.int64]:
    """The most likely tokens, the first of equals."""
    _check_finite(logits, "logits")
    rows: NDArray[np.int64] = logits.argmax(-1)
    return rows if action.tokens is None else rows + action.tokens.offset


def _raw(normalised: NDArray[np.floating], action: ActionSpec) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):  # it becomes infinite, which is refused
        actions = unnormalise(normalised, action.norm)
    _check_finite(actions, "actions")
    return actions


def _check_finite(values: NDArray[np.floating], name: str) -> None:
    if not np.isfinite(values).all():
        raise NoAction(f"expected finite {name}, found {np.count_nonzero(~np.isfinite(values))} nan or inf")
