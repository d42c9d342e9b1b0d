"""Writes a policy in the format of its original checkpoint, so that other tools load it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from rlrc.artifact import PolicySpec
from rlrc.compressor.checkpoints import reader
from rlrc.compressor.checkpoints import tensors as weights
from rlrc.compressor.checkpoints.folder import Folder, ReadOptions
from rlrc.compressor.checkpoints.layout import Layout
from rlrc.compressor.models.policy import PolicyModule
from rlrc.compressor.models.storage import tensors as models_tensors
from rlrc.compressor.models.storage.tensors import Tensors
from rlrc.compressor.models.weights import tensors_of
from rlrc.compressor.quantize.padding import unpad_policy
from rlrc.errors import UserError
from rlrc.folders import create_folder, sync

SKIPPED = (".git", ".cache")  # of download tools and git; a clone's history repeats the weights


def write_checkpoint(policy: PolicyModule, like: Folder, out: Path, options: ReadOptions | None = None) -> None:
    """Copies the folder ``like`` to ``out`` with this policy's weights: same files, names, shapes and dtypes.

    Tensors that the policy does not have (Layout.unused) stay as in ``like``. ``out`` appears complete or not at all.
    Raises UserError for another geometry or other statistics than those of ``like``, or if ``out`` exists.
    """
    layout = reader.layout(like, replace(options or ReadOptions(), incomplete=True))
    expected = reader.build(layout)
    reader.check(like, layout, expected)
    policy = unpad_policy(policy, expected.towers)
    _check_geometry(policy, expected, like)
    _check_normalisation(policy.spec, expected.spec, like)
    files, state = reader.sources(like, layout), tensors_of(policy)
    with create_folder(out) as partial:
        written = {path: tensors for tensors in files.values() for path in tensors.paths}
        for path in sorted(like.path.rglob("*")):
            relative = path.relative_to(like.path)
            if relative.parts[0] not in SKIPPED and path.is_file():
                target = partial / relative
                target.parent.mkdir(parents=True, exist_ok=True)
                if path in written:
                    write = _write_pt if written[path].file else _write_safetensors
                    write(path, target, _NewTensors(state, layout, written[path]))
                else:
                    shutil.copyfile(path, target)
        for path in partial.rglob("*"):
            sync(path)
        sync(partial)


class _NewTensors:
    """The new tensors of one file of the checkpoint, each made from the policy's when it is requested."""

    def __init__(self, state: Mapping[str, Tensor], layout: Layout, old: Tensors) -> None:
        self.old, self.state, self.layout = old, state, layout
        self.ours: dict[str, list[str]] = {}  # by the checkpoint's tensor, the policy's tensors made of it
        for ours, origin in layout.origins.items():
            for name in origin.names if origin.file == old.file else ():
                self.ours.setdefault(name, []).append(ours)

    def __call__(self, name: str) -> Tensor:
        """``name``: as in the file."""
        name = self._resolve_tied(self.old.aliases.get(name, name))
        if name not in self.ours:
            return self.old.read(name)
        origins = [self.layout.origins[ours] for ours in self.ours[name]]
        tensors = [self.state[ours] for ours in self.ours[name]]
        new = weights.restore(origins, tensors, name, [self.old.shape(source) for source in origins[0].names])
        new = new.detach().to("cpu", self.old.dtype(name)).contiguous()
        models_tensors.check_finite(new, name, f"the policy as {new.dtype}", "that type cannot hold these weights")
        return new

    def _resolve_tied(self, name: str) -> str:
        """The embedding instead of an unused head that copies it, because other tools may read the head."""
        if name in self.ours or not name.endswith("lm_head.weight"):
            return name
        same = (
            other
            for other in self.ours
            if other.endswith("embed_tokens.weight")
            and self.old.shape(other) == self.old.shape(name)
            and torch.equal(self.old.read(other), self.old.read(name))
        )
        return next(same, name)


def _check_geometry(policy: PolicyModule, expected: PolicyModule, like: Folder) -> None:
    if policy.spec.family != expected.spec.family:
        raise UserError(
            f"expected a policy of {expected.spec.family} as in {like.path}, found one of {policy.spec.family}; "
            "pass the folder that it was made from as --like"
        )
    for name, tower in expected.towers.items():
        if policy.towers.get(name) != tower:
            raise _geometry_error(f"the tower {name}", like)
    found, wanted = policy.state_dict(), expected.state_dict()
    for name in wanted | found:
        if name not in wanted or name not in found or wanted[name].shape != found[name].shape:
            raise _geometry_error(name, like)


def _check_normalisation(spec: PolicySpec, expected: PolicySpec, like: Folder) -> None:
    """Raises UserError for statistics that are not those of ``like``, whose files are copied as they are."""

    def by_part(spec: PolicySpec) -> dict[str, object]:
        pictures = {f"image.{camera.name}": (camera.mean, camera.std) for camera in spec.cameras}
        return pictures | {"state": spec.state and spec.state.norm, "action": spec.action.norm}

    own, theirs = by_part(spec), by_part(expected)
    if other := [part for part, values in own.items() if theirs.get(part) != values]:
        raise UserError(
            f"expected the normalisation of {like.path}, whose files are copied, found other statistics of "
            f"{', '.join(other)} in the artifact (see rlrc inspect); pass the folder with these statistics as --like, "
            "or export the artifact (rlrc export)"
        )


def _geometry_error(where: str, like: Folder) -> UserError:
    return UserError(
        f"expected the geometry of {like.path}, found another one in {where}; that format cannot hold a pruned policy: "
        "export it (rlrc export), or write back a policy that was not pruned"
    )


def _write_safetensors(source: Path, target: Path, tensors: _NewTensors) -> None:
    """Copies the source's header, then writes every tensor's bytes at the offset in the header."""
    with source.open("rb") as old, target.open("wb") as new:
        length = old.read(8)
        header = old.read(int.from_bytes(length, "little"))
        new.write(length + header)
        entries = {name: entry["data_offsets"] for name, entry in json.loads(header).items() if name != "__metadata__"}
        for name, (begin, end) in sorted(entries.items(), key=lambda item: item[1]):
            data = tensors(name).contiguous().reshape(-1).view(torch.uint8).numpy()
            assert data.nbytes == end - begin
            new.write(data.data)


def _write_pt(source: Path, target: Path, tensors: _NewTensors) -> None:
    """Keeps the source's names with their prefixes."""
    old = torch.load(source, map_location="cpu", weights_only=True)
    torch.save({name: tensors(name).clone() for name in old}, target)
