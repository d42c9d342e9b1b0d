"""Describes a policy for people, as rows of a table and as lines."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby, pairwise
from math import prod
from typing import Any

from rlrc.artifact import Artifact, HistoryEntry, LayerSpec, PolicySpec, TowerSpec

# rlrc.compressor.checkpoints.layout.Normalisation as JSON, by rlrc's names ("state"), nearest to raw values first.
Recorded = dict[str, list[dict[str, Any]]]


def recorded_normalisation(history: Sequence[HistoryEntry]) -> Recorded:
    """The normalisation that the last stage that changed it recorded; empty if none did."""
    records = [entry.after["normalisation"] for entry in history if "normalisation" in entry.after]
    return records[-1] if records else {}


def policy_rows(spec: PolicySpec) -> dict[str, str]:
    """Family, inputs and outputs of the policy, by heading. Dimensions of one meaning and unit are grouped."""
    prompt, action, flow = spec.prompt, spec.action, spec.flow
    kinds = [", ".join(kind) for kind in zip(action.meaning, action.units, strict=True)]
    values = f"{action.bins} bins" if action.bins else "continuous"
    if action.tokens is not None:
        values += f" among {action.tokens.rows:,} tokens"
    return {
        "family": f"{spec.family}, {spec.decode} decoding{f' in {flow.steps} steps' if flow else ''}",
        "cameras": "; ".join(
            f"{camera.name} {camera.height} x {camera.width}, resize {camera.resize}{', optional' * camera.optional}"
            for camera in spec.cameras
        ),
        "state": "none"
        if spec.state is None
        else format_names(spec.state.names, spec.state.units) + describe_padding(spec),
        "prompt": "none" if prompt is None else f"{prompt.template!r}, at most {prompt.max_tokens} tokens",
        "actions": f"{format_names(action.names, kinds)}; chunks of {action.horizon}, {values}",
    }


def describe_padding(spec: PolicySpec) -> str:
    """How the state is padded for the policy or its prompt, as the end of a sentence; empty if it is not."""
    names = () if spec.state is None else spec.state.names
    prompt, width = spec.prompt, (spec.state and spec.state.width) or 0
    if prompt is None or not prompt.state_bins:
        return f"; padded with zeros to {width} numbers" * (width > len(names))
    if prompt.state_width > len(names):
        return f"; padded with zeros to {prompt.state_width} numbers in the prompt"
    return "; unpadded in the prompt"


def normalisation_lines(recorded: Recorded) -> list[str]:
    """How each input and the action are normalised, and by which statistics: "action: MEAN_STD by action in FILE"."""

    def line(one: Mapping[str, Any]) -> str:
        if one["missing"]:
            choose = "; choose one with --unnorm-key" * bool(one["groups"])
            return f"{one['mode']}, but no statistics: found {one['missing']}{choose}"
        return f"{one['mode']} ({one['origin']})" if one["mode"] == "IDENTITY" else f"{one['mode']} by {one['origin']}"

    return [f"{name}: {', then '.join(map(line, steps))}" for name, steps in recorded.items()]


def format_names(names: Iterable[str], kinds: Iterable[str]) -> str:
    """Names with their kinds: "x, y, z (delta, m); gripper (gripper, 1)", "joint_0 to joint_6 (absolute, rad)"."""
    pairs = groupby(zip(names, kinds, strict=True), key=lambda pair: pair[1])
    return "; ".join(f"{_listed([name for name, _ in run])} ({kind})" for kind, run in pairs)


def _listed(names: list[str]) -> str:
    numbers = [re.fullmatch(r"(.*?)(\d+)", name) for name in names]
    first, last = numbers[0], numbers[-1]
    if len(names) < 4 or first is None or last is None:
        return ", ".join(names)
    counted = names == [f"{first[1]}{number}" for number in range(int(first[2]), int(last[2]) + 1)]
    return f"{names[0]} to {names[-1]}" if counted else ", ".join(names)


def describe_prunable(towers: Mapping[str, TowerSpec]) -> str:
    """Heads and MLP channels that pruning can cut: those of all towers but vision, without first and last blocks."""
    parts = []
    for name, tower in towers.items():
        if name.startswith("vision"):
            continue
        inner = tower.layers[1:-1]
        heads, channels = sum(layer.heads for layer in inner), sum(layer.mlp for layer in inner)
        parts.append(f"{name} {heads:,} heads, {channels:,} MLP channels" if inner else f"{name} nothing")
    return "; ".join(parts)


def describe_blocks(tower: TowerSpec) -> list[str]:
    """Lines such as "layers 1-30: 32 heads of 128, MLP 11,008", after one with the width."""
    places: dict[LayerSpec, list[int]] = {}
    for index, layer in enumerate(tower.layers):
        places.setdefault(layer, []).append(index)
    return [f"width {tower.width:,}", *(f"{_places(at)}: {_shape(layer)}" for layer, at in places.items())]


def _places(indices: list[int]) -> str:
    """[0, 1, 2, 5] -> "layers 0-2, 5"; [1, 3, 5] -> "layers 1, 3, ... 5"."""
    steps = {after - before for before, after in pairwise(indices)}
    if len(indices) > 2 and len(steps) == 1 and steps != {1}:
        return f"layers {indices[0]}, {indices[1]}, ... {indices[-1]}"
    runs = [[at for _, at in run] for _, run in groupby(enumerate(indices), key=lambda pair: pair[1] - pair[0])]
    listed = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
    return f"layer{'s' * (len(indices) > 1)} {listed}"


def _shape(layer: LayerSpec) -> str:
    if layer.kv_only:
        return f"keys and values only, {layer.kv_heads} of {layer.head_dim}"
    heads = f"{layer.heads} heads of {layer.head_dim}" if layer.heads != 1 else f"1 head of {layer.head_dim}"
    if layer.kv_heads != layer.heads:
        heads += f" ({layer.kv_heads} kv)"
    return f"{'cross-attention, ' * (layer.kind == 'cross')}{heads}, MLP {layer.mlp:,}"


def folder_bytes(artifact: Artifact) -> dict[str, int]:
    """Bytes by top-level entry: weights, graphs, tokenizer, golden.npz."""
    totals: dict[str, int] = {}
    for relative, file in artifact.manifest.files.items():
        top = relative.split("/")[0]
        totals[top] = totals.get(top, 0) + file.size
    return totals


def module_parameters(artifact: Artifact) -> dict[str, int]:
    """Parameters by module, from the headers of the weight files. Packed integers count as unpacked."""
    quantization, totals = artifact.manifest.quantization, dict[str, int]()
    packed = {} if quantization is None else {f"{name}.q": 8 // bits for name, bits in quantization.tensors.items()}
    scales = set() if quantization is None else {f"{name}.scale" for name in quantization.tensors}
    for relative in artifact.manifest.files:
        if not relative.startswith("weights/") or not relative.endswith(".safetensors"):
            continue
        with artifact.file(relative).open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        for name, tensor in header.items():
            if name != "__metadata__" and name not in scales:
                module = name.split(".")[0]
                totals[module] = totals.get(module, 0) + prod(tensor["shape"]) * packed.get(name, 1)
    return totals
