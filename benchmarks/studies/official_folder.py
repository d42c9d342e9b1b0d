"""Official checkpoint folders of real dimensions with random bfloat16 weights, for work that needs no trained policy.

The dimensions are those of rlrc.compressor.checkpoints.geometry. Files, their names, shards, tokenizers and settings
are in the form in which the official code saves them, so `rlrc` needs no more flags than with the real folder. One
tensor is in memory at a time.

Norms are near one and matrices preserve the scale of their inputs, so activations stay finite. Rows of a matrix, and so
heads and channels, differ in magnitude: a score by magnitude has no ties. OpenVLA's likeliest token has a clear lead:
among random logits the first two are often so close that rounding alone exchanges them, and no export would pass its
verification. Each token is followed by the next action token, whatever the pictures show.
"""

from __future__ import annotations

import itertools
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from rlrc.compressor.checkpoints import geometry
from rlrc.compressor.checkpoints.folder import Folder, ReadOptions
from rlrc.compressor.checkpoints.shapes import Language, Vision
from rlrc.compressor.models.storage.tensor_files import write_file
from rlrc.compressor.models.storage.tensors import Tensors
from rlrc.errors import UserError
from rlrc.folders import create_folder, sync

DATA = Path(__file__).parents[2] / "tests/data"
POLICIES = ("openvla-7b", "openvla-oft-7b", "pi0", "pi05", "smolvla-450m")
SHARD = 7_000_000_000  # bytes: openvla/openvla saves with max_shard_size "7GB"
PIECE = 2**23  # numbers of a tensor that are in float32 at a time
SPREAD = 0.3  # standard deviation of the logarithm of the rows' magnitudes
LLAMA_EMBEDDING, LLAMA_HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
LEAD = 30
BLANK, ACTION_TOKENS = 29871, range(31744, 32000)  # the prompt's last token, and those that it may be followed by
DATA_SETS = ("bridge_orig", "fractal20220817_data")  # two of those that OpenVLA was trained on
OFT_DATA_SET = "libero_spatial_no_noops"
DATASET_STATISTICS = "dataset_statistics.json"

# The same families in dimensions whose folders are written and pruned in seconds. Widths of vision transformers and
# heads of language models stay: rlrc knows the official ones only. Blocks, MLPs, pictures and words are fewer.
TINY: dict[str, Any] = {
    "DINOV2": Vision(1024, 3, 64, patch=14, tokens=4),
    "SIGLIP": Vision(1152, 3, 64, patch=14, tokens=4),
    "LLAMA2": Language(128, 4, 16, 16, 32, 256),
    "GEMMA_2B": Language(64, 4, 8, 1, 256, 128),
    "GEMMA_300M": Language(32, 4, 8, 1, 256, 64),
    "SMOLVLM_VISION": Vision(768, 2, 64, patch=16, tokens=16),
    "SMOLLM2": Language(64, 4, 15, 5, 64, 128),
    "SMOLVLA_EXPERT": Language(48, 4, 15, 5, 64, 96),
    "PALIGEMMA_VOCABULARY": 1024,
    "SMOLVLM_VOCABULARY": 1024,
}


def describe(name: str, tiny: bool = False) -> tuple[Folder, ReadOptions]:
    """The official policy as a folder without weights. Raises UserError for another name."""
    if name not in POLICIES:
        raise UserError(f"expected one of the policies {', '.join(POLICIES)}, found {name!r}; choose one")
    with patch.multiple(geometry, **TINY) if tiny else nullcontext():
        folder, options = geometry.folder(name)
    if not name.startswith("openvla"):
        return folder, options
    config = folder.config | {"norm_stats": {key: _dataset_statistics(key) for key in DATA_SETS}}
    virtual = dict(folder.virtual)
    if DATASET_STATISTICS in folder:
        virtual[DATASET_STATISTICS] = {OFT_DATA_SET: _dataset_statistics(OFT_DATA_SET, state=8)}
    chosen = OFT_DATA_SET if DATASET_STATISTICS in folder else DATA_SETS[0]
    return replace(folder, config=config, virtual=virtual), replace(options, unnorm_key=chosen)


def write_folder(name: str, out: Path, tiny: bool = False) -> None:
    """Write the folder of the official policy. Raises UserError if ``out`` exists."""
    described, _ = describe(name, tiny)
    with create_folder(out) as folder:
        if name.startswith("openvla"):
            _write_prismatic(folder, described, 50_000_000 if tiny else SHARD)
        else:
            _write_lerobot(folder, described, name)
        for file in folder.iterdir():
            sync(file)


# OpenVLA and OpenVLA-OFT


def _write_prismatic(folder: Path, described: Folder, shard_bytes: int) -> None:
    config = described.config | {
        "arch_specifier": "no-align+fused-gelu-mlp",
        "architectures": ["OpenVLAForActionPrediction"],
        "hf_llm_id": "meta-llama/Llama-2-7b-hf",
        "llm_max_length": 2048,
        "output_projector_states": False,
        "pad_token_id": 32000,
        "timm_model_ids": ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"],
        "timm_override_act_layers": [None, None],
        "torch_dtype": "bfloat16",
        "transformers_version": "4.40.1",
    }
    config["text_config"] |= {"torch_dtype": "bfloat16"}
    source = DATA / "openvla/checkpoint"
    if DATASET_STATISTICS in described:
        _write_json(folder / DATASET_STATISTICS, described.json(DATASET_STATISTICS))
    _write_json(folder / "config.json", config)
    _write_json(folder / "preprocessor_config.json", _preprocessor(source, config["image_sizes"][0]))
    for file in ("generation_config.json", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_bytes((source / file).read_bytes())
    write_shards(folder, random_weights(described.tensors), shard_bytes)
    for file, tensors in described.virtual.items():
        if isinstance(tensors, Tensors):
            torch.save(dict(random_weights(tensors)), folder / file)


def write_shards(folder: Path, tensors: Tensors, shard_bytes: int) -> None:
    """As transformers' ``save_pretrained``: each shard takes the next tensors that fit, in the module's order."""
    sizes = {name: tensors.meta(name).nbytes for name in tensors}
    shards: list[list[str]] = [[]]
    for name, size in sizes.items():
        if shards[-1] and sum(sizes[other] for other in shards[-1]) + size > shard_bytes:
            shards.append([])
        shards[-1].append(name)
    where = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / file, tensors, sorted(shard), {"format": "pt"})
        where |= dict.fromkeys(shard, file)
    total = sum(sizes.values())
    _write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))},
    )


def _dataset_statistics(key: str, state: int = 7) -> dict[str, Any]:
    """Statistics of a data set in OpenVLA's form, of the size of a robot's: centimetres and tenths of a radian."""
    generator = torch.Generator().manual_seed(_seed(key))

    def bounds(dim: int, unit: float) -> dict[str, list[Any]]:
        high = unit * (0.5 + torch.rand(dim, generator=generator, dtype=torch.float64))
        low = -unit * (0.5 + torch.rand(dim, generator=generator, dtype=torch.float64))
        values = {"min": 2 * low, "q01": low, "mean": (low + high) / 2, "q99": high, "max": 2 * high}
        return {name: tensor.tolist() for name, tensor in (values | {"std": (high - low) / 4}).items()}

    action = bounds(7, 0.05)
    for name, value in {"min": 0.0, "q01": 0.0, "mean": 0.5, "q99": 1.0, "max": 1.0, "std": 0.5}.items():
        action[name][6] = value  # the gripper
    action["mask"] = [True] * 6 + [False]
    return {"action": action, "num_trajectories": 1000, "num_transitions": 50_000, "proprio": bounds(state, 1.0)}


def _preprocessor(source: Path, pixels: int) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((source / "preprocessor_config.json").read_bytes())
    for entry in values["tvf_resize_params"]:
        entry["size"] = [pixels] * 2
    for entry in values["tvf_crop_params"]:
        entry["output_size"] = [pixels] * 2
    return values | {"input_sizes": [[3, pixels, pixels]] * 2}


# pi0, pi0.5 and SmolVLA


def _write_lerobot(folder: Path, described: Folder, name: str) -> None:
    tower = described.config["type"]
    source = DATA / (f"{tower}/tokenizer" if tower.startswith("pi") else "smolvla/tiny_smolvlm")
    embedding = next(key for key in described.tensors if key.endswith("embed_tokens.weight"))
    config = {
        "n_obs_steps": 1,
        "device": "cpu",
        "use_amp": False,
        "push_to_hub": True,
        "repo_id": None,
        "license": None,
        **described.config,
    }
    _write_json(folder / "config.json", config | ({"dtype": "bfloat16"} if tower.startswith("pi") else {}))
    normalizer, *prompt = described.json("policy_preprocessor.json")["steps"]
    tokens = {"task_key": "task", "padding_side": "right", "tokenizer_name": _repository(config)}
    prompt[-1] = prompt[-1] | {"config": prompt[-1]["config"] | tokens}
    # pi0.5's prompt contains the normalised state.
    inner = [normalizer, *prompt] if tower == "pi05" else [*prompt, normalizer]
    before = [_step("rename_observations_processor", rename_map={}), _step("to_batch_processor")]
    before += [*inner, _step("device_processor", device="cpu", float_dtype=None)]
    (unnormalizer,) = described.json("policy_postprocessor.json")["steps"]
    after = [unnormalizer, _step("device_processor", device="cpu", float_dtype=None)]
    for file, steps in (("policy_preprocessor", before), ("policy_postprocessor", after)):
        for number, step in enumerate(steps):
            if "state_file" in step:
                state = f"{file}_step_{number}_{step['registry_name']}.safetensors"
                _write_statistics(folder / state, described.safetensors(step["state_file"]))
                steps[number] = step | {"state_file": state}
        _write_json(folder / f"{file}.json", {"name": file, "steps": steps})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((source / name).read_bytes())
    widen_tokenizer(folder / "tokenizer.json", described.tensors.shape(embedding)[0])
    write_file(
        folder / "model.safetensors", random_weights(described.tensors), sorted(described.tensors), {"format": "pt"}
    )


def _repository(config: Mapping[str, Any]) -> str:
    return str(config.get("vlm_model_name", "google/paligemma-3b-pt-224"))


def _step(name: str, **config: Any) -> dict[str, Any]:
    return {"registry_name": name, "config": config}


def _write_statistics(path: Path, tensors: Tensors) -> None:
    stored = {name: tensors.meta(name).float() for name in tensors}
    write_file(path, Tensors(str(path), stored, lambda name: tensors.read(name).float()), list(tensors))


def widen_tokenizer(path: Path, rows: int) -> None:
    """Add pieces of two and three characters, and their merges, until there are as many as the embedding has rows."""
    values = json.loads(path.read_bytes())
    model = values["model"]
    vocabulary, merges = model["vocab"], model["merges"]
    apart = bool(merges) and isinstance(merges[0], list)
    alphabet = sorted(piece for piece in vocabulary if len(piece) == 1)
    pairs = ((first, second) for first in alphabet for second in alphabet)
    triples = ((first + second, third) for first, second, third in itertools.product(alphabet, repeat=3))
    used = {added["id"] for added in values["added_tokens"]} | set(vocabulary.values())
    free = (i for i in range(rows) if i not in used)
    for left, right in itertools.chain(pairs, triples):
        if left + right in vocabulary or left not in vocabulary:
            continue
        if (number := next(free, None)) is None:
            break
        vocabulary[left + right] = number
        merges.append([left, right] if apart else f"{left} {right}")
    path.write_text(json.dumps(values, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")


# Random weights


def random_weights(described: Tensors, dtype: torch.dtype = torch.bfloat16) -> Tensors:
    """Random values for tensors of these official names and shapes, made when they are read."""
    stored = {name: described.meta(name).to(dtype) for name in described}
    return Tensors("random weights", stored, lambda name: make_tensor(name, described.shape(name), dtype))


def make_tensor(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Random values for the tensor of this official name."""
    if len(shape) == 1 or shape[0] == 1 or "position" in name:
        center, deviation = _vector(name)
        values = torch.randn(shape, generator=torch.Generator().manual_seed(_seed(name)))
        return (center + deviation * values).to(dtype)
    former = _rows_before(shape) if name == LLAMA_HEAD else {}
    found, first = torch.empty(shape[0], prod(shape[1:]), dtype=dtype), 0
    for values in _make_matrix(name, shape):
        for row in former.keys() & set(range(first, first + len(values))):
            values[row - first] += former[row]
        found[first : first + len(values)] = values
        first += len(values)
    return found.view(shape)


def _make_matrix(name: str, shape: tuple[int, ...]) -> Iterator[Tensor]:
    """Pieces (rows, columns) in float32."""
    generator, columns = torch.Generator().manual_seed(_seed(name)), prod(shape[1:])
    sizes = torch.exp(SPREAD * torch.randn(shape[0], generator=generator))
    sizes *= sizes.square().mean().rsqrt()
    # The embedding is the first term of a sum over all blocks and must not be lost in it.
    sizes *= 3.0 if name == LLAMA_EMBEDDING else columns**-0.5
    step = max(1, PIECE // columns)
    for start in range(0, shape[0], step):
        rows = sizes[start : start + step, None]
        yield torch.randn(len(rows), columns, generator=generator).mul_(rows)


def _rows_before(shape: tuple[int, ...]) -> dict[int, Tensor]:
    """What is added to the head's row of each action token: the direction of the token that it follows.

    It is long enough for logits of about LEAD, where random ones are below 8.
    """
    before = {token: token - 1 for token in ACTION_TOKENS} | {ACTION_TOKENS[0]: ACTION_TOKENS[-1]}
    found, first = dict[int, Tensor](), 0
    for values in _make_matrix(LLAMA_EMBEDDING, shape):
        for token in {BLANK, *ACTION_TOKENS} & set(range(first, first + len(values))):
            direction = values[token - first] / values[token - first].norm()
            found[token] = LEAD * shape[1] ** -0.5 * direction
        first += len(values)
    rows = {token: found[other] for token, other in before.items()}
    middle = ACTION_TOKENS[len(ACTION_TOKENS) // 2]
    return rows | {middle: rows[middle] + found[BLANK]}


def _vector(name: str) -> tuple[float, float]:
    """Mean and standard deviation of a norm's weight, a bias, positions or extra tokens."""
    gemma = "paligemma_with_expert" in name and "vision_tower" not in name  # its norms multiply by 1 + weight
    if name.endswith((".weight", ".scale_factor")) and "position" not in name:
        return (0.0 if gemma else 1.0), 0.1
    return 0.0, 0.1


def _seed(name: str) -> int:
    return zlib.crc32(name.encode())


def _write_json(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def weight_bytes(folders: Iterable[Path]) -> int:
    """Bytes of all safetensors below the folders."""
    return sum(file.stat().st_size for folder in folders for file in folder.rglob("*.safetensors"))
