"""Official folders: what somebody's training code saved, opened natively.

Nothing of the folder is executed or unpickled and nothing is downloaded. The weights are read tensor by tensor into a
module without storage, so that there are never two copies of them.
"""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlrc import foreign
from rlrc.artifact.consistency import check_policy
from rlrc.checkpoint_folder import Flags
from rlrc.compressor.checkpoints import tensors as weights
from rlrc.compressor.checkpoints.tensors import Tensors
from rlrc.compressor.models.families import FAMILIES, NAMES, backbone
from rlrc.compressor.models.policy import Layout, Part, Policy
from rlrc.errors import UserError

CONFIG = foreign.CONFIG
HINTS = {  # what a file of hints may hold
    *("family", "prompt", "ignore", "tokenizer"),
    *("dinov2", "siglip", "image_size"),
    *("head", "robot", "num_actions_chunk", "normalization", "num_images_in_input", "use_proprio"),
    *("vision", "vlm", "expert", "text", "rms_eps", "vlm_rms_eps", "rope_theta", "rope_theta_used"),
}
UNSUPPORTED = ("pi0_fast", "pi0fast")  # near in name to what is supported, but something else


@dataclass(frozen=True)
class Options:
    """What a folder may not say itself.

    ``hints``: geometry that shapes cannot tell (see ``read_hints``); ``unnorm_key``: which data set's statistics;
    ``images``: how many pictures OpenVLA-OFT sees; ``tokenizer``: a file, or a folder that holds one; ``prompt_state``:
    whether pi0.5's prompt pads the state. ``incomplete``: statistics may be missing, for they are not used.
    """

    hints: Mapping[str, Any] = field(default_factory=dict)
    unnorm_key: str | None = None
    images: int | None = None
    tokenizer: Path | None = None
    prompt_state: str | None = None
    incomplete: bool = False


def options_of(flags: Flags) -> Options:
    """What the command line says. Raises UserError for a file of hints that is missing or broken."""
    hints = {} if flags.hints is None else read_hints(flags.hints)
    return Options(hints, flags.unnorm_key, flags.images, flags.tokenizer, flags.prompt_state)


@dataclass(frozen=True)
class Folder:
    """An official folder. ``virtual``: files that exist in memory only, JSON values or Tensors (geometry.py)."""

    path: Path
    config: dict[str, Any]
    tensors: Tensors
    virtual: Mapping[str, Any] = field(default_factory=dict)

    def __contains__(self, name: object) -> bool:
        """Whether there is a file of this name."""
        return name in self.virtual or (self.path / str(name)).is_file()

    def json(self, name: str) -> Any:
        """The values of a JSON file. Raises UserError if it is missing or broken."""
        return self.virtual[name] if name in self.virtual else read_json(self.path / name)

    def safetensors(self, name: str) -> Tensors:
        """Another file of tensors than the model's, such as a processor's state. Raises UserError if it is missing."""
        if name in self.virtual:
            return self.virtual[name]
        if not (self.path / name).is_file():
            raise UserError(f"expected {name} in {self.path}, found none; copy that file too")
        return weights.of_safetensors([self.path / name], str(self.path / name), name)

    def pt(self, pattern: str) -> Tensors | None:
        """The one ``.pt`` whose name fits the pattern, such as "action_head--*_checkpoint.pt"; None if there is none.

        Its name is ``Tensors.file``. Raises UserError if several fit or if it has anything but tensors.
        """
        names = sorted({path.name for path in self.path.glob(pattern)} | {n for n in self.virtual if _fits(n, pattern)})
        if len(names) > 1:
            raise UserError(
                f"expected one file {pattern} in {self.path}, found {', '.join(names)}; keep those of one step"
            )
        if not names:
            return None
        return self.virtual[names[0]] if names[0] in self.virtual else weights.of_pt(self.path / names[0])


def open_folder(path: Path) -> Folder:
    """Reads config.json and the headers of the weights. Raises UserError for what is missing or broken."""
    if not path.is_dir():
        raise UserError(f"expected a checkpoint's folder at {path}, found {foreign.found(path)}")
    if foreign.is_adapter(path):
        raise UserError(f"expected a checkpoint with its weights at {path}, found {foreign.found(path)}")
    if not (path / CONFIG).exists():
        missing = f"expected {path / CONFIG}, found: No such file or directory"
        raise UserError(f"{missing}; {path} is {foreign.found(path)}")
    config = read_json(path / CONFIG)
    if not isinstance(config, dict):
        raise UserError(f"expected an object in {path / CONFIG}, found {type(config).__name__}; copy that file again")
    mark, root = NAMES.get(str(config.get("type") or config.get("model_type")), ("", ""))
    tensors = weights.of_model(path)
    weights.check_merged(tensors)
    return Folder(path, config, weights.unwrapped(tensors, mark, root))


def read_json(path: Path) -> Any:
    """Raises UserError for a file that is missing or is not JSON. A whole number of 19 digits or more becomes a float:
    no setting is that large, and Python's integers of any length overflow wherever they are computed with."""
    try:
        return json.loads(path.read_bytes(), parse_int=lambda text: int(text) if len(text) < 19 else float(text))
    except OSError as error:
        raise UserError(f"expected {path}, found: {error.strerror}; copy that file too") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"expected JSON in {path}, found: {error}; copy that file again") from None


def read_hints(path: Path) -> dict[str, Any]:
    """Keys of ``geometry``, ``loader_hints`` and ``oft`` of a file that has these sections, or the file's own keys.

    ``tokenizer``, if there, is a path from the file on; what follows it in brackets is a remark.
    """
    values = read_json(path)
    if not isinstance(values, dict):
        raise UserError(f"expected an object in {path}, found {type(values).__name__}; give keys with values")
    sections = [values[name] for name in ("geometry", "loader_hints", "oft") if isinstance(values.get(name), dict)]
    if unknown := sorted(values.keys() - HINTS) if not sections else ():
        close = difflib.get_close_matches(unknown[0], HINTS, 1)
        raise UserError(
            f"expected the hints {', '.join(sorted(HINTS))} in {path}, found {unknown[0]}"
            + (f"; did you mean {close[0]}?" if close else "; leave it out")
        )
    hints = {name: value for section in sections or [values] for name, value in section.items()}
    if isinstance(values.get("tokenizer"), str):
        hints["tokenizer"] = str(path.parent / values["tokenizer"].split(" (")[0])
    return hints


def recognise(folder: Folder) -> Any:
    """The backbone's module of the folder's family. Raises UserError for an unknown one, with the nearest match."""
    for file in dict.fromkeys(FAMILIES.values()):
        module = backbone(next(family for family, name in FAMILIES.items() if name == file))
        if hasattr(module, "recognise") and module.recognise(folder):
            return module
    known = [family for family in FAMILIES if family != "tiny"]
    kind = folder.config.get("type") or folder.config.get("model_type")
    expected = f"expected a checkpoint of one of the families {', '.join(known)}, found"
    if not kind:
        raise UserError(f"{expected} {foreign.found(folder.path)}")
    close = difflib.get_close_matches(str(kind).lower(), known, 1)
    near = f"the nearest is {close[0]}" if close and kind not in UNSUPPORTED else "rlrc does not support that policy"
    raise UserError(f"{expected} {kind!r} in {folder.path / CONFIG}; {near}")


def read(
    folder: Folder, options: Options | None = None, dtype: torch.dtype | None = torch.float32
) -> tuple[Policy, Layout]:
    """The policy in evaluation mode, its floating-point weights in ``dtype`` (None: as stored).

    Peak memory is that of the weights and one more tensor. Raises UserError for tensors that are missing, left over or
    of another shape than the geometry says.
    """
    module = recognise(folder)
    layout: Layout = module.layout(folder, options or Options())
    policy = build(module, layout)
    check(folder, layout, policy)
    files = sources(folder, layout)
    for name, stored in policy.state_dict().items():
        part = layout.parts[name]
        tensors = files[part.file]
        tensor = weights.convert(part, [tensors.sound(official) for official in part.official])
        wanted = dtype if dtype is not None and stored.is_floating_point() else tensor.dtype
        _assign(policy, name, tensor.to(wanted, copy=True).contiguous())
    return policy.eval(), layout


def print_assumed(layout: Layout) -> None:
    """Prints on stderr what was assumed."""
    for line in layout.assumed:
        print(f"rlrc: assumed {line}", file=sys.stderr)


def build(module: Any, layout: Layout) -> Policy:
    """The layout's policy on the meta device: all shapes, no data."""
    with torch.device("meta"):
        return module.build(layout.spec, layout.towers)


def check(folder: Folder, layout: Layout, policy: Policy) -> None:
    """Every tensor of the policy from official ones of the right shape, every official one used or known as unused.

    And a description that an artifact may have, with finite statistics.
    """
    check_policy(layout.spec)
    if strange := policy.state_dict().keys() ^ layout.parts.keys():
        raise RuntimeError(f"the layout of {layout.spec.family} and its module differ in {sorted(strange)}")
    files, unused = sources(folder, layout), set(layout.unused)
    for name, expected in policy.state_dict().items():
        part = layout.parts[name]
        tensors = files[part.file]
        metas = [tensors.meta(official) for official in part.official]
        for official, meta in zip(part.official, metas, strict=True):
            if meta.dtype not in weights.FLOATS:
                raise weights.not_floats(official, meta.dtype, tensors.origin)
        try:
            found = weights.convert(part, metas).shape
        except RuntimeError:  # they cannot be joined
            found = None
        if found != expected.shape:
            shapes = ", ".join(str(tuple(meta.shape)) for meta in metas)
            what = f"tensor{'s' * (len(metas) > 1)} {', '.join(part.official)}"
            wanted = f"{tuple(expected.shape)}" + f" (after {part.convert!r})" * (part.convert != "same")
            raise weights.wrong_shape(what, wanted, shapes, tensors.origin)
    for file, tensors in files.items():
        used = {official for part in layout.parts.values() if part.file == file for official in part.official}
        if left := [name for name in tensors if name not in used and name not in unused]:
            raise UserError(
                f"expected a config that fits the weights of {tensors.origin}, found {len(left)} tensors more than "
                f"{layout.spec.family} has, such as {left[0]}; is its config.json (or --hints) of these weights?"
            )


def sources(folder: Folder, layout: Layout) -> dict[str, Tensors]:
    """The official tensors by Part.file, opened."""
    files = {"": folder.tensors}
    for part in layout.parts.values():
        if part.file not in files:
            virtual = folder.virtual.get(part.file)
            files[part.file] = weights.of_pt(folder.path / part.file) if virtual is None else virtual
    return files


def _assign(policy: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    module = policy.get_submodule(owner)
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
    else:
        module._buffers[leaf] = tensor


def _fits(name: str, pattern: str) -> bool:
    return Path(name).match(pattern)


__all__ = ["Folder", "Layout", "Options", "Part", "Tensors", "open_folder", "read", "read_hints", "read_json"]
