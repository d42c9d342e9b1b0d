"""Reads checkpoint folders as policies: recognises the family, checks every tensor, and loads the weights.

No code of the folder runs, nothing is unpickled, and nothing is downloaded. Weights keep the type in which they are
stored (see rlrc.compressor.models.weights).
"""

from __future__ import annotations

import difflib
import sys

from rlrc.artifact.consistency import check_policy
from rlrc.checkpoint_folder import describe_path
from rlrc.compressor.checkpoints import tensors as weights
from rlrc.compressor.checkpoints.folder import CONFIG, Folder, ReadOptions
from rlrc.compressor.checkpoints.layout import Layout
from rlrc.compressor.checkpoints.lerobot import act, flow
from rlrc.compressor.checkpoints.prismatic import openvla
from rlrc.compressor.models.families import FAMILIES
from rlrc.compressor.models.meta import build_on_meta
from rlrc.compressor.models.policy import PolicyModule
from rlrc.compressor.models.storage import tensors as models_tensors
from rlrc.compressor.models.storage.tensors import Tensors
from rlrc.compressor.models.weights import set_tensor
from rlrc.errors import UserError

MAPPED = 200_000_000  # bytes: all policies whose memory is predicted (rlrc.compressor.stages.memory)
UNSUPPORTED = ("pi0_fast", "pi0fast")  # similar names, but other architectures


def layout(folder: Folder, options: ReadOptions) -> Layout:
    """The layout of the folder's policy. Reads no weights.

    Raises UserError for an unknown family, naming the nearest one, and as the family's own ``layout``.
    """
    for family in (openvla, flow, act):
        if family.recognise(folder):
            found: Layout = family.layout(folder, options)
            return found
    known = [family for family in FAMILIES if family != "tiny"]
    kind = folder.config.get("type") or folder.config.get("model_type")
    expected = f"expected a checkpoint of one of the families {', '.join(known)}, found"
    if not kind:
        raise UserError(f"{expected} {describe_path(folder.path)}")
    close = difflib.get_close_matches(str(kind).lower(), known, 1)
    near = f"the nearest is {close[0]}" if close and kind not in UNSUPPORTED else "rlrc does not support that policy"
    raise UserError(f"{expected} {kind!r} in {folder.path / CONFIG}; {near}")


def read(folder: Folder, options: ReadOptions | None = None) -> tuple[PolicyModule, Layout]:
    """The policy in evaluation mode, with the weights as stored.

    Weights of ``MAPPED`` bytes or more are views of the mapped files, which must not change meanwhile (see
    ``Tensors.check_unchanged``), unless they are stored otherwise than the policy has them (joined, permuted).

    Raises UserError for tensors that are missing, left over or of another shape than the geometry says.
    """
    found = layout(folder, options or ReadOptions())
    policy = build(found)
    check(folder, found, policy)
    files = sources(folder, found)
    large = sum(tensors.meta(name).nbytes for tensors in files.values() for name in tensors) >= MAPPED
    for name in policy.state_dict():
        origin = found.origins[name]
        tensors = files[origin.file]
        tensor = weights.convert(origin, [tensors.read_finite(source) for source in origin.names])
        set_tensor(policy, name, tensor.contiguous() if large else tensor.contiguous().clone())
    return policy.eval(), found


def print_assumptions(layout: Layout) -> None:
    """Prints the layout's assumptions on stderr."""
    for line in layout.assumed:
        print(f"rlrc: assumed {line}", file=sys.stderr)


def build(layout: Layout) -> PolicyModule:
    """The layout's policy on the meta device: all shapes, no data."""
    return build_on_meta(layout.spec, layout.towers)


def check(folder: Folder, layout: Layout, policy: PolicyModule) -> None:
    """Checks that every tensor of the policy has an origin of the right shape, and that every other tensor is unused.

    Raises UserError if not, and for a description that no artifact may have (check_policy).
    """
    check_policy(layout.spec)
    if strange := policy.state_dict().keys() ^ layout.origins.keys():
        raise RuntimeError(f"the layout of {layout.spec.family} and its module differ in {sorted(strange)}")
    files, unused = sources(folder, layout), set(layout.unused)
    for name, expected in policy.state_dict().items():
        origin = layout.origins[name]
        tensors = files[origin.file]
        metas = [tensors.meta(source) for source in origin.names]
        for source, meta in zip(origin.names, metas, strict=True):
            if meta.dtype not in models_tensors.FLOATS:
                raise models_tensors.not_floats_error(source, meta.dtype, tensors.origin)
        try:
            found = weights.convert(origin, metas).shape
        except RuntimeError:  # torch.cat refuses them
            found = None
        if found != expected.shape:
            shapes = ", ".join(str(tuple(meta.shape)) for meta in metas)
            what = f"tensor{'s' * (len(metas) > 1)} {', '.join(origin.names)}"
            wanted = f"{tuple(expected.shape)}" + f" (after {origin.convert!r})" * (origin.convert != "same")
            raise models_tensors.wrong_shape_error(what, wanted, shapes, tensors.origin)
    for file, tensors in files.items():
        used = {source for origin in layout.origins.values() if origin.file == file for source in origin.names}
        if left := [name for name in tensors if name not in used and name not in unused]:
            raise UserError(
                f"expected a config that fits the weights of {tensors.origin}, found {len(left)} tensors more than "
                f"{layout.spec.family} has, such as {left[0]}; is its config.json (or --hints) of these weights?"
            )


def sources(folder: Folder, layout: Layout) -> dict[str, Tensors]:
    """The tensors of every file that the layout names, by TensorOrigin.file."""
    files = {"": folder.tensors}
    for origin in layout.origins.values():
        if origin.file not in files:
            virtual = folder.virtual.get(origin.file)
            files[origin.file] = weights.of_pt(folder.path / origin.file) if virtual is None else virtual
    return files
