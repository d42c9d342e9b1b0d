"""Read a torch policy from an artifact and write one, with golden observations and their outputs.

golden.npz holds raw observations: ``image.<camera>`` uint8 (N, H, W, 3), ``state`` (N, S), ``instructions`` (N,),
``noise`` (N, horizon, width) for flow policies, ``ids`` (N, L) padded with -1. It also holds the policy's outputs in
float32: un-normalised ``actions`` (N, horizon, dim), and for token policies ``tokens`` (N, horizon, dim) and ``logits``
(N, horizon, dim, rows). Arrays that a policy does not have are absent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rlrc.artifact import (
    GOLDEN,
    WEIGHTS,
    Artifact,
    Draft,
    HistoryEntry,
    Manifest,
    PolicySpec,
    QuantizationSpec,
    TowerSpec,
    weight_files,
)
from rlrc.compressor.models.policy import Inputs, Outputs, PolicyModule
from rlrc.compressor.models.storage.tensor_files import write_tensors
from rlrc.compressor.models.storage.tensors import Tensors, tensors_from_safetensors
from rlrc.compressor.models.weights import PolicyWeights, build_policy, narrow_tensors
from rlrc.compressor.quantize.grid import decompress
from rlrc.compressor.quantize.quantize import QuantizedWeights
from rlrc.errors import UserError
from rlrc.runtime.inference.preprocess import prepare, unnormalise

CURVES = "curves"
UNSOUND = "nothing was written: start from finite weights, or train with a lower --rate"
OUTPUTS = ("actions", "tokens", "logits")


def open_tensors(artifact: Artifact) -> Tensors:
    """The artifact's tensors as stored: bfloat16, or packed integers with scales. Their files are mapped, not read."""
    files = [artifact.file(name) for name in weight_files(artifact.manifest)]
    return tensors_from_safetensors(files, str(artifact.path), advice="make the artifact again")


def load_policy(artifact: Artifact) -> PolicyModule:
    """The policy in evaluation mode. Its weights are views of the mapped files, and quantized ones are dequantized when
    they are used: call ``widen`` for many passes. Raises UserError for tensors that do not fit.
    """
    manifest = artifact.manifest
    return _build(manifest.policy, manifest.towers, open_tensors(artifact), manifest.quantization)


def _build(
    spec: PolicySpec,
    towers: dict[str, TowerSpec],
    tensors: Tensors,
    quantization: QuantizationSpec | None,
    advice: str = "make it again from sound weights",
) -> PolicyModule:
    return build_policy(spec, towers, decompress(tensors, quantization), tensors.origin, advice)


def read_observations(file: Path) -> dict[str, np.ndarray]:
    """The observations of a golden.npz, without the outputs."""
    with np.load(file) as arrays:
        return {name: arrays[name] for name in arrays.files if name not in OUTPUTS}


def inputs_of(spec: PolicySpec, observations: Mapping[str, np.ndarray], row: int) -> Inputs:
    """One observation of a golden.npz as a batch of one, as the runtime passes it to the graphs."""
    values = {name: array[row] for name, array in observations.items()}
    prepared = prepare(values, spec, tokenizer=None)

    def batch(array: np.ndarray | None) -> Tensor | None:
        return None if array is None else torch.from_numpy(array[None])

    ids = values["ids"][values["ids"] >= 0] if "ids" in values else None
    pixels = [torch.from_numpy(picture[None]) for picture in prepared.pixels]
    return Inputs(pixels, batch(ids), batch(prepared.state), noise=batch(values.get("noise")))


def every_input(spec: PolicySpec, observations: Mapping[str, np.ndarray]) -> Iterator[Inputs]:
    """``inputs_of`` for every row."""
    return (inputs_of(spec, observations, row) for row in range(len(next(iter(observations.values())))))


def compute_outputs(policy: PolicyModule, observations: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The policy's outputs in float32, one observation at a time. Raises UserError for actions that are not finite."""
    spec = policy.eval().spec
    with torch.inference_mode():
        outputs = [policy.act(inputs) for inputs in every_input(spec, observations)]
    with np.errstate(over="ignore"):  # infinite actions are refused below
        actions = unnormalise(_stack(outputs, "actions"), spec.action.norm)
    if broken := [row for row in actions if not np.isfinite(row).all()]:
        raise UserError(
            f"expected finite actions of the policy, found nan or inf for {len(broken)} of {len(outputs)} golden "
            f"observations; {UNSOUND}"
        )
    return {"actions": actions} | {name: _stack(outputs, name) for name in ("tokens", "logits") if spec.action.bins}


def golden(policy: PolicyModule, observations: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The observations and the policy's outputs: see the module's docstring."""
    return {**observations, **compute_outputs(policy, observations)}


def _stack(outputs: list[Outputs], name: str) -> np.ndarray:
    return torch.cat([getattr(output, name) for output in outputs]).numpy()


def apply_quantization(policy: PolicyModule | PolicyWeights, result: QuantizedWeights) -> PolicyModule:
    """The policy with the weights of ``result``, dequantized when they are used."""
    return _build(policy.spec, policy.towers, result.tensors, result.spec, UNSOUND)


def write_policy(
    draft: Draft,
    policy: PolicyModule | PolicyWeights,
    observations: Mapping[str, np.ndarray],
    history: tuple[HistoryEntry, ...],
    quantization: QuantizedWeights | None = None,
    exact: bool = False,
) -> Manifest:
    """Finish a draft with a policy's weights and the goldens of exactly the stored weights.

    Weights are stored in bfloat16, or as in ``quantization``. ``exact`` stores tensors that bfloat16 would change in
    float32, for stages without training. The manifest's dtype is that of most weights. One tensor at a time is in
    memory, and one block's weights while the goldens are computed.
    """
    weights, spec = PolicyWeights.of(policy), None if quantization is None else quantization.spec
    tensors = narrow_tensors(weights.tensors, exact) if quantization is None else quantization.tensors
    folder = draft.file(WEIGHTS).parent
    write_tensors(folder, tensors)
    written = tensors_from_safetensors(sorted(folder.glob("*.safetensors")), "the new artifact")
    stored = _build(policy.spec, policy.towers, written, spec, UNSOUND)
    np.savez_compressed(draft.file(GOLDEN), **golden(stored, observations))  # type: ignore[arg-type]
    wide = sum(tensors.meta(name).numel() for name in tensors if tensors.dtype(name) == torch.float32)
    return draft.finish(
        Manifest(
            policy=policy.spec,
            towers=policy.towers,
            parameters=weights.count(),
            dtype=spec.grid if spec else "float32" if 2 * wide > weights.count() else "bfloat16",
            quantization=spec,
            history=history,
        )
    )
