"""The TensorRT target (graphs/tensorrt), with the plan from which `rlrc jetson build` makes engines."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from rlrc.artifact import GOLDEN, Artifact, Draft, GraphSpec, PolicySpec
from rlrc.artifact.build_plan import PLAN, BuildPlan, GraphPlan, write_plan
from rlrc.artifact.precisions import CHOICES, OVERFLOWS, PRECISIONS
from rlrc.compressor.models.storage.scratch import Scratch
from rlrc.errors import UserError
from rlrc.exporters.graphs import find_graphs
from rlrc.exporters.graphs.weights import Weights, read_weights
from rlrc.exporters.tensorrt.builder import Float, TensorRTBuilder, TensorRTFormat
from rlrc.exporters.tensorrt.int8 import measure_scales
from rlrc.exporters.tensorrt.profiles import Lengths, make_profiles
from rlrc.folders import sha256
from rlrc.runtime.inference.backends import FOLDERS
from rlrc.runtime.inference.verify import read_golden

TENSORRT = "10.3"  # of JetPack 6; its parser reads blocked 4-bit integers and does not limit the opset
WORKSPACE = 2**30


def choose_precision(parent: Artifact, precision: str | None) -> str:
    """The precision asked for, or the default. Raises UserError for one that these weights cannot have."""
    manifest = parent.manifest
    choices = CHOICES["tensorrt"][manifest.quantization.grid if manifest.quantization else "float"]
    if manifest.policy.family in OVERFLOWS:
        choices = tuple(choice for choice in choices if choice != "fp16")
        if precision == "fp16":
            raise UserError(
                f"expected a precision that holds the activations of {manifest.policy.family}, found fp16, which they "
                "overflow; use --precision bf16"
            )
    if precision is None:
        return choices[0]
    if precision not in choices:
        raise UserError(
            f"expected a precision of {', '.join(choices)} for weights in {manifest.dtype} on TensorRT, "
            f"found {precision}; choose one of those"
        )
    return precision


def write_graphs(draft: Draft, parent: Artifact, precision: str) -> tuple[GraphSpec, ...]:
    manifest, folder = parent.manifest, FOLDERS["tensorrt"]
    definitions, weights = find_graphs(manifest.policy.family), read_weights(parent)
    chosen = choose_format(parent, weights, precision)
    specs = []
    for name, define in definitions.items():
        builder = TensorRTBuilder(weights, chosen, Scratch(draft.path).empty)
        file = f"{folder}/{name}.onnx"
        define(builder, manifest.policy, manifest.towers)
        builder.write(name, draft.file(file))
        inputs, outputs, needs = tuple(builder.inputs), tuple(builder.outputs), {"tensorrt": f">={TENSORRT}"}
        specs.append(GraphSpec(name, "tensorrt", file, precision, inputs, outputs, needs))
    write_plan(make_plan(draft.path, parent, specs, precision), draft.file(PLAN))
    return tuple(specs)


def choose_format(parent: Artifact, weights: Weights, precision: str) -> TensorRTFormat:
    half: Float = "bfloat16" if parent.manifest.policy.family in OVERFLOWS or precision == "bf16" else "float16"
    if precision == "int8" or precision == "fp8":
        return TensorRTFormat(half, scales=measure_scales(parent, weights, precision), eight=precision)  # type: ignore[arg-type]
    return TensorRTFormat("float32" if precision == "fp32" else half, keep_int4=precision == "int4")


def make_plan(folder: Path, parent: Artifact, specs: list[GraphSpec], precision: str) -> BuildPlan:
    policy, quantization = parent.manifest.policy, parent.manifest.quantization
    prompt = measure_prompts(parent, policy)
    graphs = []
    for spec in specs:
        files = [file for file in (spec.file, f"{spec.file}.data") if (folder / file).exists()]
        hashes = {file: sha256(folder / file) for file in files}
        graphs.append(GraphPlan(spec.name, hashes, spec.inputs, make_profiles(policy, spec, specs[0], prompt)))
    block = quantization.group if quantization and precision == "int4" else None
    used = [precision, "bf16"] if policy.family in OVERFLOWS and precision != "fp32" else [precision]
    least = max(PRECISIONS[name].least_sm or 0 for name in used)
    return BuildPlan(precision, TENSORRT, least, WORKSPACE, tuple(graphs), block)  # type: ignore[arg-type]


def measure_prompts(parent: Artifact, policy: PolicySpec) -> Lengths:
    """The lengths of prompts; the usual one is the longest of the golden observations."""
    if policy.prompt is None:
        return Lengths(1, 1)
    ids = read_golden(parent.file(GOLDEN), policy).ids
    longest = policy.prompt.max_tokens if ids is None else int(np.max((ids >= 0).sum(1)))
    return Lengths(longest, max(longest, policy.prompt.max_tokens))
