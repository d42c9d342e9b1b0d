"""A torch policy from an artifact and back: weights in, weights out, with golden observations and their outputs."""

from __future__ import annotations

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlrc.artifact import Artifact, ArtifactError, Draft, HistoryEntry, Manifest
from rlrc.compressor.backbones.tiny import TinyPolicy
from rlrc.compressor.quantize import QuantizeConfig, dequantize, quantize
from rlrc.runtime.preprocess import bin_centers, normalise, pictures, unnormalise

WEIGHTS = "weights/model.safetensors"
TOKENIZER = "tokenizer/tokenizer.json"
GOLDEN = "golden.npz"
CURVES = "curves"
OBSERVATIONS = ("images", "state", "instructions", "ids")


def read_tensors(artifact: Artifact) -> dict[str, Tensor]:
    """Tensors as stored: bfloat16, or packed integers with scales."""
    file = artifact.file(WEIGHTS)
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ArtifactError(f"expected safetensors in {file}, found {error}; make the artifact again") from None


def load_policy(artifact: Artifact) -> TinyPolicy:
    """The policy in float32 and evaluation mode, int4 weights dequantized. A tensor that does not fit is refused."""
    policy = TinyPolicy(artifact.manifest.policy, artifact.manifest.towers)
    load_tensors(policy, dequantize(read_tensors(artifact), artifact.manifest.quantization), str(artifact.path))
    return policy.eval()


def load_tensors(policy: TinyPolicy, tensors: dict[str, Tensor], origin: str) -> None:
    expected = policy.state_dict()
    for name in sorted(expected.keys() | tensors.keys()):
        found = tuple(tensors[name].shape) if name in tensors else "nothing"
        wanted = tuple(expected[name].shape) if name in expected else "nothing"
        if found != wanted:
            raise ArtifactError(
                f"expected {wanted} for tensor {name} in {origin}, found {found}; make the artifact again"
            )
    policy.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})


def parameters(policy: TinyPolicy) -> int:
    return sum(tensor.numel() for tensor in policy.parameters())


def golden(policy: TinyPolicy, observations: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Reference outputs in float32 for raw observations.

    ``images`` (N, cameras, H, W, 3), ``state`` (N, S), ``instructions`` (N,), ``ids`` (N, L).
    """
    spec = policy.spec
    assert spec.state is not None
    pixels = torch.from_numpy(pictures(observations["images"][:, 0], spec.cameras[0]))
    state = torch.from_numpy(normalise(observations["state"], spec.state.norm))
    with torch.inference_mode():
        logits = policy.eval()(pixels, torch.from_numpy(observations["ids"]), state).numpy()
    tokens = logits.argmax(-1)
    actions = unnormalise(bin_centers(spec.action.bins)[tokens], spec.action.norm)
    outputs = {"logits": logits, "tokens": tokens, "actions": actions.astype(np.float32)}
    return {name: observations[name] for name in OBSERVATIONS} | outputs


def quantized(policy: TinyPolicy, config: QuantizeConfig) -> TinyPolicy:
    """The policy with its weights rounded to the 4-bit grid, in float32."""
    result = TinyPolicy(policy.spec, policy.towers)
    result.load_state_dict(dequantize(*quantize(policy.state_dict(), config)))
    return result.eval()


def write_policy(
    draft: Draft,
    policy: TinyPolicy,
    observations: dict[str, np.ndarray],
    history: tuple[HistoryEntry, ...],
    quantization: QuantizeConfig | None = None,
) -> Manifest:
    """Finish a draft with a policy's weights (bfloat16, or packed int4) and the goldens of exactly those weights."""
    state = {name: tensor.detach().contiguous() for name, tensor in policy.state_dict().items()}
    spec = None
    if quantization is None:
        tensors = {name: tensor.bfloat16() for name, tensor in state.items()}
    else:
        tensors, spec = quantize(state, quantization)
    save_file(tensors, draft.file(WEIGHTS))
    stored = TinyPolicy(policy.spec, policy.towers)
    load_tensors(stored, dequantize(tensors, spec), "the new artifact")
    np.savez_compressed(draft.file(GOLDEN), **golden(stored, observations))  # type: ignore[arg-type]
    return draft.finish(
        Manifest(
            policy=policy.spec,
            towers=policy.towers,
            parameters=parameters(policy),
            dtype="bfloat16" if spec is None else "int4",
            quantization=spec,
            history=history,
        )
    )
