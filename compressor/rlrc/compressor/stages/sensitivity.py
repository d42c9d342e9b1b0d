"""Sensitivity: how far the actions move when one module alone is pruned, quantized or dropped.

- prune: a part of a block's heads and channels is removed, those with the smallest weights;
- quantize: the attention or the MLP of a block, or another linear layer, is rounded as in ``quantize``;
- drop: a whole block passes the residual stream on. Keys and values that another tower reads stay.

The error is the mean |difference| of normalised actions over the policy's golden observations. The policy is not
copied: the tensors of one module at a time are replaced, and then restored.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from rlrc import strict
from rlrc.compressor.models.coupling import Group, find_groups
from rlrc.compressor.models.device import CPU, upload
from rlrc.compressor.models.policy import Inputs, PolicyModule
from rlrc.compressor.prune.sensitivity_report import KINDS, Kind, SensitivityReport, SensitivityRow
from rlrc.compressor.quantize.action_error import soft_actions, swap_tensors
from rlrc.compressor.quantize.grid import dequantize_groups, quantize_groups
from rlrc.compressor.quantize.quantize import quantizable
from rlrc.compressor.stages.artifact_io import inputs_of
from rlrc.compressor.stages.sources import PolicySource, check_unquantized
from rlrc.errors import UserError
from rlrc.progress import progress
from rlrc.ranges import check_range

BATCH = 16  # observations in one pass
ACTION_RANGE = 2.0  # of a normalised action: the error of an action that is not finite


@dataclass(frozen=True)
class SensitivityConfig:
    ratio: float = 0.5
    """fraction of a block's heads and MLP channels that is removed"""
    bits: Literal[4, 8] = 4
    """bits of the quantized weights"""
    kinds: tuple[Kind, ...] = KINDS
    """which changes are measured"""
    observations: int = 64
    """maximum number of golden observations"""

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise UserError(f"expected --ratio between 0 and 1 (excluded), found {self.ratio}")
        if not self.kinds:
            raise UserError(f"expected --kinds {', '.join(KINDS)}, found none; name one or more")
        check_range(self, "--", "observations", at_least=1)


@dataclass(frozen=True)
class Perturbation:
    """A change of one module: ``tensors()`` replaces some of its tensors; None drops the block."""

    module: str
    kind: Kind
    parameters: int
    tensors: Callable[[], Mapping[str, Tensor]] | None = None


def perturbations(policy: PolicyModule, config: SensitivityConfig) -> list[Perturbation]:
    """All changes to measure, in the order of the modules."""
    state, found = policy.state_dict(), list[Perturbation]()

    def size(module: str) -> int:
        return sum(tensor.numel() for name, tensor in state.items() if name.startswith(f"{module}."))

    for tower, spec in policy.towers.items():
        for i, layer in enumerate(spec.layers):
            block = f"{tower}.layers.{i}"
            if layer.kind == "half":  # it passes the residual stream on anyway
                continue
            found.append(Perturbation(block, "drop", size(block)))
            if parts := [group for group in find_groups(policy.towers, tower, i, state, align=1) if group.number]:
                found.append(Perturbation(block, "prune", size(block), _prune_block(state, parts, config.ratio)))
    modules: dict[str, list[str]] = {}
    for name, tensor in state.items():
        if quantizable(name, tensor):
            modules.setdefault(part_of(name), []).append(name)
    for module, names in modules.items():
        found.append(Perturbation(module, "quantize", size(module), _round_weights(state, names, config.bits)))
    return [change for change in found if change.kind in config.kinds]


def part_of(tensor: str) -> str:
    """The module that a tensor is quantized with: a block's attention or MLP, otherwise the layer itself."""
    names = tensor.split(".")
    return ".".join(names[:4] if names[1] == "layers" and len(names) > 5 else names[:-1])


def _prune_block(state: Mapping[str, Tensor], parts: Sequence[Group], ratio: float) -> Callable[[], dict[str, Tensor]]:
    """Zero the output columns of the smallest heads and channels, so that they add nothing to the residual stream."""

    def tensors() -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for group in parts:
            each = [group.sum_parts(layer, state[f"{layer}.weight"].float().abs()) for layer in group.layers]
            stay = group.select_best(torch.stack(each).sum(0).cpu(), group.count_left(ratio))
            gone = torch.ones(group.number, dtype=torch.bool)
            gone[stay] = False
            for layer in group.columns:
                weight = state[f"{layer}.weight"].clone()
                weight[:, upload(group.indices(gone.nonzero()[:, 0]), weight.device)] = 0
                found[f"{layer}.weight"] = weight
        return found

    return tensors


def _round_weights(state: Mapping[str, Tensor], names: Sequence[str], bits: int) -> Callable[[], dict[str, Tensor]]:
    def tensors() -> dict[str, Tensor]:
        return {name: round_weight(state[name], bits) for name in names}

    return tensors


def round_weight(weight: Tensor, bits: int) -> Tensor:
    return dequantize_groups(*quantize_groups(weight, bits, search=True))


@contextmanager
def apply_change(policy: PolicyModule, change: Perturbation) -> Iterator[None]:
    """Apply the change within the context. Afterwards the policy has its original tensors."""
    if change.tensors is None:
        hook = policy.get_submodule(change.module).register_forward_hook(_pass_through)
        try:
            yield
        finally:
            hook.remove()
        return
    with swap_tensors(policy, change.tensors()):
        yield


def _pass_through(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
    """Replace a block's output by its input; keys and values are unchanged."""
    return (inputs[0], *output[1:]) if isinstance(output, tuple) else inputs[0]


def action_change(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Mean |difference| of normalised actions (see action_error.py); one that is not finite counts ACTION_RANGE."""
    differences = torch.cat([b - a for a, b in zip(before, after, strict=True)])
    return differences.abs().nan_to_num(ACTION_RANGE, posinf=ACTION_RANGE).mean().item()


def make_batches(inputs: Sequence[Inputs]) -> list[Inputs]:
    """Single observations -> batches in which all prompts have the same length."""
    lengths: dict[int, list[Inputs]] = {}
    for one in inputs:
        lengths.setdefault(0 if one.ids is None else one.ids.shape[1], []).append(one)
    runs = [rows[i : i + BATCH] for rows in lengths.values() for i in range(0, len(rows), BATCH)]
    return [_concatenate(run) for run in runs]


def _concatenate(rows: Sequence[Inputs]) -> Inputs:
    def concatenate(name: str) -> Tensor | None:
        tensors = [getattr(row, name) for row in rows]
        return None if tensors[0] is None else torch.cat(tensors)

    pixels = [torch.cat(pictures) for pictures in zip(*(row.pixels for row in rows), strict=True)]
    return Inputs(pixels, concatenate("ids"), concatenate("state"), noise=concatenate("noise"))


def measure(
    source: PolicySource, name: str, config: SensitivityConfig, journal: Path, where: torch.device = CPU
) -> SensitivityReport:
    """Measure every change alone, on a device. A later call with the same ``journal`` file resumes after the last one.

    Raises UserError for a quantized policy, and for one whose actions are not finite.
    """
    check_unquantized(source, name)
    policy, observations = source.load().eval().to(where), source.observations()
    count = len(next(iter(observations.values())))
    rows = np.linspace(0, count - 1, min(count, config.observations)).round().astype(int)
    batches = [one.to(where) for one in make_batches([inputs_of(source.spec, observations, row) for row in rows])]

    def actions() -> list[Tensor]:
        return [soft_actions(policy, policy.act(inputs)) for inputs in batches]

    report = SensitivityReport("sensitivity", name, source.digest, config.ratio, config.bits, len(rows), ())
    with torch.inference_mode(), progress("sensitivity", len(todo := perturbations(policy, config))) as report_progress:
        before = actions()
        if not all(values.isfinite().all() for values in before):
            raise UserError(f"expected finite actions of {name}, found nan or inf; check its weights")
        found = _read_journal(journal, report)
        for number, change in enumerate(todo):
            report_progress(number, change.module)
            if (change.module, change.kind) in found:
                continue
            with apply_change(policy, change):
                error = action_change(before, actions())
            measured = SensitivityRow(change.module, change.kind, error, change.parameters)
            found[change.module, change.kind] = measured
            with journal.open("a") as file:
                file.write(json.dumps(strict.encode(measured)) + "\n")
        report_progress(len(todo), "")
    return replace(report, modules=tuple(found[change.module, change.kind] for change in todo))


def _read_journal(journal: Path, report: SensitivityReport) -> dict[tuple[str, Kind], SensitivityRow]:
    """The measurements of an interrupted call with the same settings; otherwise start a new journal."""
    head, *lines = journal.read_text().splitlines() if journal.exists() else [""]
    if head != (same := json.dumps(strict.encode(report))):
        journal.write_text(same + "\n")
        return {}
    rows = [strict.decode(SensitivityRow, json.loads(line)) for line in lines if line.endswith("}")]
    return {(row.module, row.kind): row for row in rows}
