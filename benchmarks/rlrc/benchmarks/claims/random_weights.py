"""Full-size policies with random weights: latency and memory do not depend on the values of the weights.

Tensors are generated on access and not kept, so graphs of any size are written with one tensor in memory. Norms are
near one and weights preserve the scale of their inputs, so no value becomes infinite or subnormal (which is slower).
Needs torch and the exporters' packages.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatch
from importlib import import_module
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

from rlrc import artifact as artifacts
from rlrc.artifact import TOKENIZER, Artifact, Manifest, PolicySpec, QuantizationSpec, TowerSpec
from rlrc.compressor.checkpoints import geometry, reader
from rlrc.compressor.models.meta import build_on_meta
from rlrc.compressor.models.policy import PolicyModule
from rlrc.compressor.models.storage.tensors import Tensors
from rlrc.compressor.prune.lossless import cut_lossless
from rlrc.compressor.quantize.grid import GROUP
from rlrc.compressor.quantize.padding import pad_towers
from rlrc.compressor.quantize.quantize import QuantizeConfig, choose_bits, quantizable
from rlrc.exporters.export import MODULES
from rlrc.exporters.graphs.weights import Weights

Towers = dict[str, TowerSpec]
NOISE = 2**22  # numbers, which are repeated: more than a processor's cache holds


def dense(name: str) -> tuple[PolicySpec, Towers]:
    """The spec and towers of the official policy of this name, without parts that inference does not use."""
    folder, options = geometry.folder(name)
    layout = reader.layout(folder, options)
    return use_plain_prompt(layout.spec), layout.towers


def use_plain_prompt(spec: PolicySpec) -> PolicySpec:
    """Reduce the prompt to the instruction's words, a token each (see ``write_tokenizer``)."""
    if spec.prompt is None:
        return spec
    return replace(spec, prompt=replace(spec.prompt, template="{instruction}", edits=(), suffix=(), known={}))


def compressed(spec: PolicySpec, towers: Towers) -> tuple[PolicySpec, Towers]:
    """Apply all lossless cuts to pruned towers, and pad MLPs to whole groups of 4-bit weights."""
    policy, _ = cut_lossless(build_shapes(spec, towers))
    return policy.spec, pad_towers(policy.towers)


def build_shapes(spec: PolicySpec, towers: Towers) -> PolicyModule:
    return build_on_meta(spec, towers)


def modules(spec: PolicySpec, towers: Towers) -> dict[str, int]:
    """Parameters of each module."""
    counts: dict[str, int] = {}
    for name, tensor in build_shapes(spec, towers).state_dict().items():
        module = name.split(".")[0]
        counts[module] = counts.get(module, 0) + tensor.numel()
    return counts


def manifest(spec: PolicySpec, towers: Towers, eight: Sequence[str] | None = None) -> Manifest:
    """The manifest of a policy in bfloat16; with ``eight``, as after `rlrc quantize`: 4 bits, but 8 for word embeddings
    and tensors that match these patterns.
    """
    shapes = build_shapes(spec, towers).state_dict()
    parameters = sum(tensor.numel() for tensor in shapes.values())
    if eight is None:
        return Manifest(spec, towers, parameters, "bfloat16")
    exempt = tuple(n for n, t in shapes.items() if quantizable(n, t) and any(fnmatch(n, pattern) for pattern in eight))
    chosen = choose_bits(shapes, QuantizeConfig(exempt, embeddings=8))
    return Manifest(spec, towers, parameters, "int4", QuantizationSpec("int4", GROUP, chosen))


def write(out: Path, policy: Manifest, target: str, precision: str | Mapping[str, str]) -> Artifact:
    """Write an artifact with the graphs of one backend and a dummy tokenizer, unverified."""
    exporter = import_module(MODULES[target])
    with artifacts.create_artifact(out) as draft:
        write_tokenizer(draft.file(TOKENIZER), policy.policy)
        parent = Artifact(draft.path, policy, digest="")
        draft.finish(replace(policy, graphs=exporter.write_graphs(draft, parent, precision, weights(policy))))
    return artifacts.load(out, verify=())


def write_job(job: tuple[Path, Manifest, str, str | Mapping[str, str]]) -> Artifact:
    """``write`` with one argument, for worker processes."""
    return write(*job)


def write_tokenizer(path: Path, spec: PolicySpec) -> None:
    """The word w7 is token 7."""
    words = {f"w{i}": i for i in range(min(int(spec.geometry.get("vocabulary", 1)), 1000))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(path))


@contextmanager
def tokenizer_file(spec: PolicySpec) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder) / "tokenizer.json", spec)
        yield Path(folder) / "tokenizer.json"


def weights(policy: Manifest) -> Weights:
    """Weights for every tensor of the policy, quantized according to the manifest."""
    quantization, stored = policy.quantization, dict[str, Tensor]()
    bits = quantization.tensors if quantization else {}
    for name, tensor in build_shapes(policy.policy, policy.towers).state_dict().items():
        if name in bits:
            rows, columns = tensor.shape
            integers = torch.uint8 if bits[name] == 4 else torch.int8
            stored[f"{name}.q"] = torch.empty(rows, columns * bits[name] // 8, dtype=integers, device="meta")
            stored[f"{name}.scale"] = torch.empty(rows, columns // GROUP, dtype=torch.float16, device="meta")
        else:
            stored[name] = torch.empty(tensor.shape, dtype=torch.bfloat16, device="meta")
    noise = make_noise()

    def read(name: str) -> Tensor:
        if (width := bits.get(name.removesuffix(".scale"))) and name.endswith(".scale"):
            return scales(stored[name], width)
        return values(stored[name], noise)

    return Weights(Tensors("random weights", stored, read), quantization)


def make_noise() -> Tensor:
    return torch.randn(NOISE, generator=torch.Generator().manual_seed(0))


def values(like: Tensor, noise: Tensor) -> Tensor:
    """Random values for a tensor of this shape and type."""
    shape, count = tuple(like.shape), like.numel()
    repeated = noise.repeat(-(-count // len(noise)))[:count].view(shape)
    if not like.dtype.is_floating_point:
        return (repeated * 1e4).to(torch.int32).to(like.dtype)
    return (1 + 0.1 * repeated if len(shape) == 1 else repeated / shape[-1] ** 0.5).to(like.dtype)


def scales(like: Tensor, bits: int) -> Tensor:
    """Scales for uniformly distributed integers, so that the weights have the size of unquantized ones."""
    spread = 4.6 if bits == 4 else 74.0
    return torch.full(like.shape, 1 / (spread * (like.shape[1] * GROUP) ** 0.5), dtype=like.dtype)


def build_in_torch(spec: PolicySpec, towers: Towers, dtype: torch.dtype) -> PolicyModule:
    """Build the policy with weights, one tensor at a time."""
    policy, noise = build_shapes(spec, towers).to(dtype), make_noise()
    for module in policy.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                value = values(parameter, noise)
                module._parameters[key] = nn.Parameter(value, requires_grad=False)
    return policy.eval()
