"""What the types of a manifest cannot say: lengths that must agree, and references between its parts."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from rlrc.strict import StrictError

if TYPE_CHECKING:
    from rlrc.artifact import Manifest


def is_inside(relative: str) -> bool:
    """Whether the name is a plain path below the artifact's folder (and not the manifest itself)."""
    parts = PurePosixPath(relative)
    return (
        not parts.is_absolute()
        and ".." not in parts.parts
        and str(parts) == relative
        and relative not in (".", "manifest.json")
    )


def check_consistent(manifest: Manifest) -> None:
    """What the types cannot say: lengths that must agree, and references between the parts."""

    def check(holds: bool, expected: str, found: object) -> None:
        if not holds:
            raise StrictError(f"expected {expected}, found {found}")

    policy = manifest.policy
    action = policy.action
    for where, part in (("policy.action", action), ("policy.state", policy.state)):
        if part is not None:
            lengths = [len(part.names), len(part.units), len(part.norm.center), len(part.norm.scale)]
            check(len(set(lengths)) == 1, f"names, units, norm.center and norm.scale of one length at {where}", lengths)
            check(
                all(scale > 0 for scale in part.norm.scale), f"positive numbers at {where}.norm.scale", part.norm.scale
            )
    check(len(action.meaning) == action.dim, f"{action.dim} entries at policy.action.meaning", len(action.meaning))
    check(
        action.horizon > 0 and action.bins >= 0,
        "a positive policy.action.horizon and bins >= 0",
        (action.horizon, action.bins),
    )
    names = [camera.name for camera in policy.cameras]
    check(len(set(names)) == len(names), "every camera once at policy.cameras", names)
    for camera in policy.cameras:
        fits = camera.height > 0 and camera.width > 0 and all(std > 0 for std in camera.std)
        check(
            fits, f"a positive height, width and std of camera {camera.name}", (camera.height, camera.width, camera.std)
        )
    for tower, spec in manifest.towers.items():
        for index, layer in enumerate(spec.layers):
            shared = layer.heads % layer.kv_heads == 0 if layer.kv_heads > 0 else layer.heads == 0
            fits = shared and min(layer.heads, layer.kv_heads, layer.mlp) >= 0 and layer.head_dim > 0
            check(fits, f"a possible block (kv_heads divide heads) at towers.{tower}.layers[{index}]", layer)
    quantized = manifest.quantization is not None
    check(
        quantized == (manifest.dtype == "int4"), "quantization exactly where dtype is int4", f"dtype {manifest.dtype}"
    )
    for relative in manifest.files:
        check(is_inside(relative), "plain relative paths at files", repr(relative))
    for graph in manifest.graphs:
        check(graph.file in manifest.files, f"the graph {graph.name}'s {graph.file} among files", list(manifest.files))
