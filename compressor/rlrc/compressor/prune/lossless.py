"""Lossless cuts: removes weights that no action depends on, and precomputes what is the same for every observation.

- Rows of a language model's head that are not action tokens. The actions stay the same wherever the likeliest token of
  the whole vocabulary is an action token; ``count_outside`` counts where it is not.
- Layers that compute the modulations of adaptive norms from the flow's time: replaced by tables over the flow steps.
- The first self-attention of ACT's decoder: its values are zeros, so its output is a constant.

Tensors of official checkpoints that are never loaded (Layout.unused) are included in the report.
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
from rlrc.compressor.models.storage.tensors import Tensors
from rlrc.compressor.models.weights import narrow_dtype, set_tensor


@dataclass(frozen=True)
class Cut:
    """``what`` was cut, and how many parameters and bytes that saved (replacements deducted)."""

    what: str
    parameters: int
    bytes: int


@dataclass
class _Remainder:
    """The policy that is left, modified by every cut."""

    spec: PolicySpec
    towers: dict[str, TowerSpec]
    state: dict[str, Tensor]


def cut_lossless(policy: PolicyModule, unread: Sequence[Cut] = ()) -> tuple[PolicyModule, dict[str, Any]]:
    """A policy with the same actions, and a report: every cut, parameters and bytes before and after.

    ``unread``: tensors of the official checkpoint that were not loaded (see ``list_unread``). Bytes are those of an
    artifact: two for a tensor that bfloat16 holds exactly, else four. The given policy is unchanged and shares all
    tensors that were not cut.
    """
    rest = _Remainder(policy.spec, dict(policy.towers), dict(policy.state_dict()))
    whole, own = _size(rest.state), list[Cut]()
    with torch.no_grad():
        for what, cut in (
            ("rows of the head that are no action tokens", _head),
            ("layers that make the norms' modulations", _modulations),
            ("the decoder's first self-attention, a constant", _constant),
        ):
            before = dict(rest.state)
            cut(policy, rest)
            removed, added = _size(_changed(before, rest.state)), _size(_changed(rest.state, before))
            own.append(Cut(what, removed[0] - added[0], removed[1] - added[1]))
    result = build_on_meta(rest.spec, rest.towers)
    for name in result.state_dict():
        set_tensor(result, name, rest.state[name])

    def counts(unit: Literal["parameters", "bytes"], size: int) -> dict[str, int]:
        more, less = (sum(getattr(cut, unit) for cut in cuts) for cuts in (unread, own))
        return {"before": size + more, "after": size - less}

    return result, {
        "cuts": [asdict(cut) for cut in (*unread, *own) if cut.parameters],
        "parameters": counts("parameters", whole[0]),
        "bytes": counts("bytes", whole[1]),
    }


def _changed(tensors: dict[str, Tensor], others: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that are not also in the other state dict."""
    return {name: tensor for name, tensor in tensors.items() if others.get(name) is not tensor}


def format_report(report: Mapping[str, Any]) -> list[str]:
    """The report as lines of text. An entry "outside" has the counts of ``count_outside``."""
    lines = [f"{cut['what']}: {cut['parameters']:,} parameters, {cut['bytes']:,} bytes" for cut in report["cuts"]]
    numbers, size = report["parameters"], report["bytes"]
    part = 1 - size["after"] / size["before"]
    lines.append(
        f"{numbers['before']:,} parameters -> {numbers['after']:,}, {size['before']:,} bytes -> {size['after']:,} "
        f"({part:.1%} less)"
    )
    if outside := report.get("outside"):
        lines.append(
            f"the likeliest token of the whole vocabulary was no action token in {outside['changed']} of "
            f"{outside['observations']} golden observations: only there the action may differ"
        )
    return lines


def list_unread(stored: Tensors, unused: Iterable[str]) -> list[Cut]:
    """Official tensors that are not loaded, by the largest modules without any loaded tensor (model.vae_encoder)."""
    unused = set(unused)
    used = {prefix for name in stored if name not in unused for prefix in _prefixes(name)}
    modules: dict[str, list[Tensor]] = {}
    for name in stored:
        if name in unused:
            module = next((prefix for prefix in _prefixes(name) if prefix not in used), name)
            modules.setdefault(module, []).append(stored.meta(name))
    return [Cut(f"{module}, never read", *_size(dict(enumerate(found)))) for module, found in modules.items()]


def _prefixes(name: str) -> list[str]:
    """a.b.weight -> [a, a.b]."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def _size(tensors: Mapping[Any, Tensor]) -> tuple[int, int]:
    """Numbers, and bytes in an artifact (tensors without data count in their own dtype)."""
    numbers = size = 0
    for tensor in tensors.values():
        numbers += tensor.numel()
        size += (tensor if tensor.is_meta else narrow_dtype(tensor, exact=True)).nbytes
    return numbers, size


def count_outside(tokens: NDArray[np.integer], action: ActionSpec) -> int:
    """In how many of N observations one of the tokens (N, horizon, dim) is not an action token."""
    if action.tokens is None:
        return 0
    kept = _action_tokens(action)
    others = (tokens < kept.offset) | (tokens >= kept.offset + kept.rows)
    return int(others.any((1, 2)).sum())


def _action_tokens(action: ActionSpec) -> TokenSpec:
    """The same tokens with logits for action tokens only: one row more than bins (256 for OpenVLA)."""
    assert action.tokens is not None
    return replace(action.tokens, rows=action.bins + 1, offset=action.tokens.first - action.bins)


def _head(policy: PolicyModule, rest: _Remainder) -> None:
    tokens = rest.spec.action.tokens
    if tokens is None:
        return
    kept = _action_tokens(rest.spec.action)
    start = kept.offset - tokens.offset
    rest.spec = replace(rest.spec, action=replace(rest.spec.action, tokens=kept))
    rest.state["head.weight"] = rest.state["head.weight"][start : start + kept.rows].clone()


def _modulations(policy: PolicyModule, rest: _Remainder) -> None:
    """A table (flow steps, 3 * width) for every norm of pi0.5's adaRMS (arXiv 2504.16054)."""
    tower, flow = rest.towers.get("expert"), rest.spec.flow
    if tower is None or flow is None or tower.norm != "adaptive":
        return
    assert isinstance(policy, FlowPolicy)
    x = torch.zeros(1, 1, flow.width, device=policy.action_in.weight.device)
    # One step at a time, as the policy does: bit-identical.
    conditions = [policy.suffix(None, x, x.new_full((1,), 1 - i / flow.steps))[1] for i in range(flow.steps)]
    for name, module in policy.named_modules():
        if isinstance(module, AdaptiveRMSNorm):
            del rest.state[f"{name}.dense.weight"], rest.state[f"{name}.dense.bias"]
            rest.state[f"{name}.table"] = torch.cat([module.dense(condition) for condition in conditions])
    rest.state = {name: tensor for name, tensor in rest.state.items() if not name.startswith(("time_in.", "time_out."))}
    rest.towers["expert"] = replace(tower, norm="steps")


def _constant(policy: PolicyModule, rest: _Remainder) -> None:
    """All values are equal, so their weighted mean is that value for any attention weights."""
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
