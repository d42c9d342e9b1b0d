"""Tensors of checkpoint files: names and shapes from the headers, data one tensor at a time."""

from __future__ import annotations

import json
import re
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from rlrc.checkpoint_folder import describe_path
from rlrc.compressor.checkpoints.layout import TensorOrigin
from rlrc.compressor.models.storage.tensors import Tensors, tensors_from_safetensors
from rlrc.errors import UserError

MODEL = "model.safetensors"
INDEX = "model.safetensors.index.json"
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
ADAPTED = re.compile(r"\.(base_layer|lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector)(\.|$)")
# Buffers that older training code saved although the configuration determines them.
BUFFERS = ("rotary_emb.inv_freq", "rotary_emb.original_inv_freq", "position_ids", "num_batches_tracked", "masked_bias")
THIRDS = ("query", "key", "value")  # of one tensor


def of_model(folder: Path) -> Tensors:
    """A folder's model.safetensors, or its shards. Raises UserError for a missing or damaged file."""
    if (folder / MODEL).is_file():
        return tensors_from_safetensors([folder / MODEL], str(folder))
    if not (folder / INDEX).is_file():
        raise UserError(f"expected {MODEL} or {INDEX} in {folder}, found neither: {describe_path(folder)}")
    try:
        index = json.loads((folder / INDEX).read_bytes())
        shards = sorted(set(index["weight_map"].values()))
        if not all(isinstance(shard, str) and Path(shard).name == shard for shard in shards):
            raise ValueError(f"expected plain names of files, found {shards}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"expected a weight_map in {folder / INDEX}, found: {error or type(error).__name__}; copy that file again"
        ) from None
    for count, shard in enumerate(shards, 1):
        if not (folder / shard).is_file():
            raise UserError(
                f"expected the shard {shard} ({count} of {len(shards)}) in {folder}, found none; copy that file too"
            )
    tensors = tensors_from_safetensors([folder / shard for shard in shards], str(folder))
    if lost := sorted(index["weight_map"].keys() - set(tensors)):
        raise UserError(
            f"expected the tensor {lost[0]} in the shard {index['weight_map'][lost[0]]} of {folder}, found none; "
            "copy that file again"
        )
    return tensors


def check_merged(tensors: Tensors) -> None:
    """Raises UserError for weights of a PEFT adapter that is not merged."""
    if lora := next((name for name in tensors if ADAPTED.search(name)), None):
        raise UserError(
            f"expected merged weights in {tensors.origin}, found those of a PEFT adapter as well, such as {lora}; "
            "call merge_and_unload() before saving (rlrc does not merge adapters yet)"
        )


def strip_wrappers(tensors: Tensors, mark: str = "", root: str = "") -> Tensors:
    """The tensors under the training code's own names.

    Removes the parts that wrappers (DistributedDataParallel, torch.compile, FSDP) add, and any other prefix that all
    names share. At least one of the code's own names begins with ``root`` and then ``mark``.
    """
    names = {name: ".".join(part for part in name.split(".") if part not in WRAPPERS) for name in tensors}
    if mark and (first := next((name for name in names.values() if f".{name}".find(f".{mark}") >= 0), None)):
        before = first[: f".{first}".find(f".{mark}")]
        extra, put = (before.removesuffix(root), "") if before.endswith(root) else (before, root)
        if (extra or put) and all(name.startswith(extra) for name in names.values()):
            names = {old: put + new.removeprefix(extra) for old, new in names.items()}
    return tensors if all(old == new for old, new in names.items()) else tensors.rename(names)


def of_pt(path: Path) -> Tensors:
    """The tensors of a ``.pt``, under names without wrappers.

    No code of the file runs (``weights_only``). Raises UserError if it holds anything but tensors.
    """
    try:
        try:
            values = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the format of torch before 1.6 cannot be mapped
            values = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file may raise nearly anything
        # Torch's own message advises the user to run the code in the file.
        named = re.search(r"GLOBAL (\S+)", str(error))
        found = f"an object of {named[1]}" if named else "a file without tensors"
        raise UserError(f"expected nothing but tensors in {path}, found {found}; save a state_dict() there") from None
    if not isinstance(values, dict):
        raise UserError(
            f"expected tensors by name in {path}, found {type(values).__name__}; save the module's state_dict()"
        )
    for name, value in values.items():
        if not isinstance(value, Tensor) or not isinstance(name, str):
            raise UserError(
                f"expected nothing but tensors in {path}, found {type(value).__name__} at {name!r}; "
                "save the module's state_dict()"
            )
    return strip_wrappers(Tensors(str(path), values, file=path.name, paths=(path,)))


def convert(origin: TensorOrigin, tensors: list[Tensor]) -> Tensor:
    """The checkpoint's tensors -> the policy's (see TensorOrigin); on the meta device for the shape alone."""
    if origin.convert == "patches":
        return tensors[0].permute(0, 2, 3, 1).flatten(1)
    if origin.convert == "flat":
        tensors = [tensor.reshape(-1, tensor.shape[-1]) for tensor in tensors]
    if origin.convert in THIRDS:
        return tensors[0].reshape(3, -1, *tensors[0].shape[1:])[THIRDS.index(origin.convert)]
    return tensors[0] if len(tensors) == 1 else _concatenate(tensors)


def _concatenate(tensors: list[Tensor]) -> Tensor:
    """``torch.cat``, which imports torch._dynamo on the meta device. Raises RuntimeError where shapes differ."""
    shape = tensors[0].shape
    if not shape or not tensors[0].is_meta:
        return torch.cat(tensors)
    if any(not tensor.shape or tensor.shape[1:] != shape[1:] for tensor in tensors):
        raise RuntimeError("the shapes differ")
    return torch.empty((sum(len(tensor) for tensor in tensors), *shape[1:]), device="meta")


def restore(origins: list[TensorOrigin], tensors: list[Tensor], name: str, shapes: list[tuple[int, ...]]) -> Tensor:
    """The inverse of ``convert``: the checkpoint's tensor ``name`` from the policy's tensors that are made of it.

    ``shapes`` are those of ``origins[0].names``, which contains ``name``.
    """
    origin, tensor, index = origins[0], tensors[0], origins[0].names.index(name)
    if origin.convert == "patches":
        _, colours, rows, columns = shapes[0]
        return tensor.reshape(-1, rows, columns, colours).permute(0, 3, 1, 2)
    if origin.convert in THIRDS:
        thirds = {origin.convert: tensor for origin, tensor in zip(origins, tensors, strict=True)}
        return torch.cat([thirds[third] for third in THIRDS])
    lengths = [prod(shape[:-1]) if origin.convert == "flat" else shape[0] if shape else 1 for shape in shapes]
    pieces = torch.split(tensor, lengths) if len(shapes) > 1 else [tensor]
    return pieces[index].reshape(shapes[index])
