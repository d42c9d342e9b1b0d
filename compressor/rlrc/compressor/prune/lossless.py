"""Lossless cuts: what no action depends on goes, and what is the same for every observation is computed beforehand.

- Rows of a language model's head that are no action tokens. The actions are the same wherever the likeliest token of
  the whole vocabulary is an action token; ``outside`` counts where it is not.
- Modulations of adaptive norms, which depend on the flow's time alone: tables of the fixed flow steps take the place of
  the layers that make them, and of the time's own.
- The first self-attention of ACT's decoder: its values are zeros, so its output is a constant.

What the readers never load (Layout.unused) is reported with them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlrc.artifact import ActionSpec, PolicySpec, TokenSpec, TowerSpec
from rlrc.compressor.models.flow import FlowPolicy
from rlrc.compressor.models.meta import build_on_meta
from rlrc.compressor.models.nn import detr
from rlrc.compressor.models.nn.decoder import AdaptiveRMSNorm
from rlrc.compressor.models.policy import PolicyModule
from rlrc.compressor.models.tensors import Tensors
from rlrc.compressor.models.weights import narrowed


@dataclass(frozen=True)
class Cut:
    """What went, less what took its place."""

    what: str
    parameters: int
    bytes: int


@dataclass
class _Rest:
    """What is left of a policy while it is cut."""

    spec: PolicySpec
    towers: dict[str, TowerSpec]
    state: dict[str, Tensor]


def lossless(policy: PolicyModule, unread: Sequence[Cut] = ()) -> tuple[PolicyModule, dict[str, Any]]:
    """A policy with the same actions, and a report: every cut, parameters and bytes before and after.

    ``unread``: what the policy's official folder had more (see ``never_read``). Bytes are those of an artifact: two for
    a number that bfloat16 holds, else four. The given policy is unchanged; what was not cut is shared with it.
    """
    rest = _Rest(policy.spec, dict(policy.towers), dict(policy.state_dict()))
    whole, own = _size(rest.state), list[Cut]()
    with torch.no_grad():
        for what, cut in (
            ("rows of the head that are no action tokens", _head),
            ("layers that make the norms' modulations", _modulations),
            ("the decoder's first self-attention, a constant", _constant),
        ):
            before = dict(rest.state)
            cut(policy, rest)
            gone, new = _size(_others(before, rest.state)), _size(_others(rest.state, before))
            own.append(Cut(what, gone[0] - new[0], gone[1] - new[1]))
    result = build_on_meta(rest.spec, rest.towers)
    result.load_state_dict(rest.state, assign=True)

    def counts(unit: Literal["parameters", "bytes"], size: int) -> dict[str, int]:
        more, less = (sum(getattr(cut, unit) for cut in cuts) for cuts in (unread, own))
        return {"before": size + more, "after": size - less}

    return result.eval(), {
        "cuts": [asdict(cut) for cut in (*unread, *own) if cut.parameters],
        "parameters": counts("parameters", whole[0]),
        "bytes": counts("bytes", whole[1]),
    }


def _others(tensors: dict[str, Tensor], than: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if than.get(name) is not tensor}


def lines(report: Mapping[str, Any]) -> list[str]:
    """The report for people; ``outside``, if it is there, counts observations (see the function)."""
    found = [f"{cut['what']}: {cut['parameters']:,} parameters, {cut['bytes']:,} bytes" for cut in report["cuts"]]
    numbers, size = report["parameters"], report["bytes"]
    part = 1 - size["after"] / size["before"]
    found.append(
        f"{numbers['before']:,} parameters -> {numbers['after']:,}, {size['before']:,} bytes -> {size['after']:,} "
        f"({part:.1%} less)"
    )
    if outside := report.get("outside"):
        found.append(
            f"the likeliest token of the whole vocabulary was no action token in {outside['changed']} of "
            f"{outside['observations']} golden observations: only there may the action be another"
        )
    return found


def never_read(stored: Tensors, unused: Iterable[str]) -> list[Cut]:
    """The official tensors that are not read, in as few modules as hold nothing else: ``model.vae_encoder``, say."""
    unused = set(unused)
    used = {prefix for name in stored if name not in unused for prefix in _prefixes(name)}
    modules: dict[str, list[Tensor]] = {}
    for name in stored:
        if name in unused:
            module = next((prefix for prefix in _prefixes(name) if prefix not in used), name)
            modules.setdefault(module, []).append(stored.meta(name))
    return [Cut(f"{module}, never read", *_size(dict(enumerate(found)))) for module, found in modules.items()]


def _prefixes(name: str) -> list[str]:
    """Of a.b.weight: a, a.b."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def _size(tensors: Mapping[Any, Tensor]) -> tuple[int, int]:
    """How many numbers they have, and how many bytes an artifact stores them in (without data: as they are)."""
    numbers = size = 0
    for tensor in tensors.values():
        numbers += tensor.numel()
        size += (tensor if tensor.is_meta else narrowed(tensor, exact=True)).nbytes
    return numbers, size


def outside(tokens: NDArray[np.integer], action: ActionSpec) -> int:
    """In how many observations a token (N, horizon, dim) is no action token."""
    if action.tokens is None:
        return 0
    kept = _action_tokens(action)
    others = (tokens < kept.offset) | (tokens >= kept.offset + kept.rows)
    return int(others.any((1, 2)).sum())


def _action_tokens(action: ActionSpec) -> TokenSpec:
    """The same tokens, but the logits have a row for each action token only: one more than bins (OpenVLA's 256)."""
    assert action.tokens is not None
    return replace(action.tokens, rows=action.bins + 1, offset=action.tokens.first - action.bins)


def _head(policy: PolicyModule, rest: _Rest) -> None:
    tokens = rest.spec.action.tokens
    if tokens is None:
        return
    kept = _action_tokens(rest.spec.action)
    start = kept.offset - tokens.offset
    rest.spec = replace(rest.spec, action=replace(rest.spec.action, tokens=kept))
    rest.state["head.weight"] = rest.state["head.weight"][start : start + kept.rows].clone()


def _modulations(policy: PolicyModule, rest: _Rest) -> None:
    """pi0.5's adaRMS (arXiv 2504.16054): of every norm a table (steps, 3 * width)."""
    tower, flow = rest.towers.get("expert"), rest.spec.flow
    if tower is None or flow is None or tower.norm != "adaptive":
        return
    assert isinstance(policy, FlowPolicy)
    x = torch.zeros(1, 1, flow.width, device=policy.action_in.weight.device)
    # One step at a time, as the policy does it: the same numbers to the last bit.
    conditions = [policy.suffix(None, x, x.new_full((1,), 1 - i / flow.steps))[1] for i in range(flow.steps)]
    for name, module in policy.named_modules():
        if isinstance(module, AdaptiveRMSNorm):
            del rest.state[f"{name}.dense.weight"], rest.state[f"{name}.dense.bias"]
            rest.state[f"{name}.table"] = torch.cat([module.dense(condition) for condition in conditions])
    rest.state = {name: tensor for name, tensor in rest.state.items() if not name.startswith(("time_in.", "time_out."))}
    rest.towers["expert"] = replace(tower, norm="steps")


def _constant(policy: PolicyModule, rest: _Rest) -> None:
    """Whatever the weights of its attention are, a mean of equal values is that value."""
    decoder = getattr(policy, "decoder", None)
    if not isinstance(decoder, detr.Transformer):
        return
    tower, block = rest.towers["decoder"], decoder.layers[0]
    assert isinstance(block, detr.DetrBlock)
    if not block.attention.heads:
        return
    zeros = torch.zeros_like(block.norm1.weight)
    value = block.norm1(zeros) if block.pre_norm else zeros
    constant = block.attention.o(block.attention.v(value))
    prefix = "decoder.layers.0.attention."
    rest.state = {name: tensor for name, tensor in rest.state.items() if not name.startswith(prefix)}
    rest.state[f"{prefix}o.bias"] = constant
    first, *others = tower.layers
    rest.towers["decoder"] = replace(tower, layers=(replace(first, heads=0, kv_heads=0), *others))
