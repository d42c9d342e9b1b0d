"""Checks of a manifest beyond its types: lengths that must agree, and references between its parts."""

from __future__ import annotations

from math import inf, isfinite
from pathlib import PurePosixPath

from rlrc.artifact.spec import ActionSpec, CameraSpec, Manifest, PolicySpec, PromptSpec, StateSpec, TowerSpec
from rlrc.strict import StrictError


def is_inside(relative: str) -> bool:
    """Whether the name is a plain path inside the artifact's folder, and not the manifest."""
    parts = PurePosixPath(relative)
    return (
        not parts.is_absolute()
        and ".." not in parts.parts
        and str(parts) == relative
        and relative not in (".", "manifest.json")
    )


def check_consistent(manifest: Manifest) -> None:
    """Raises StrictError where lengths disagree, numbers are out of range, or a reference leads nowhere."""
    check_policy(manifest.policy)
    for name, tower in manifest.towers.items():
        _check_tower(name, tower, manifest.policy)
    if manifest.policy.decode != "parallel":
        _check("decoder" in manifest.towers, "a tower decoder, which caches keys and values", list(manifest.towers))
    _check_quantization(manifest)
    for relative in manifest.files:
        _check(is_inside(relative), "plain relative paths at files", repr(relative))
    for graph in manifest.graphs:
        _check(graph.file in manifest.files, f"the graph {graph.name}'s {graph.file} among files", list(manifest.files))


def _check_quantization(manifest: Manifest) -> None:
    grid = None if manifest.quantization is None else manifest.quantization.grid
    rounded = manifest.dtype if manifest.dtype in ("int4", "int8") else None
    found = f"dtype {manifest.dtype} and grid {grid}"
    _check(grid == rounded, "quantization exactly where dtype is int4 or int8, and of that grid", found)
    if manifest.quantization is not None:
        _check(manifest.quantization.group > 0, "a positive quantization.group", manifest.quantization.group)
        bits = set(manifest.quantization.tensors.values())
        _check(bits <= {4, 8}, "4 or 8 bits at quantization.tensors", sorted(bits))


def check_policy(policy: PolicySpec) -> None:
    """``check_consistent`` for a policy alone."""
    names = [camera.name for camera in policy.cameras]
    _check(0 < len(set(names)) == len(names), "at least one camera, each name once, at policy.cameras", names)
    for camera in policy.cameras:
        _check_camera(camera)
    _check_vector(policy.action, "policy.action")
    if policy.state is not None:
        _check_vector(policy.state, "policy.state")
        width, least = policy.state.width, len(policy.state.names)
        _check(width is None or width >= least, f"null or at least {least} at policy.state.width", width)
    if policy.prompt is not None:
        _check_prompt(policy.prompt, policy)
    _check_action(policy.action, policy)
    _check((policy.flow is not None) == (policy.decode == "flow"), "policy.flow where decode is flow", policy.decode)
    if policy.flow is not None:
        fits = policy.flow.steps > 0 and policy.flow.width >= policy.action.dim
        _check(fits, f"a step and {policy.action.dim} or more of width at policy.flow", policy.flow)


def _check_camera(camera: CameraSpec) -> None:
    fits = camera.height > 0 and camera.width > 0 and all(0 < std < inf for std in camera.std)
    found = (camera.height, camera.width, camera.std)
    _check(fits, f"a positive height, width and finite std of camera {camera.name}", found)
    _check(all(map(isfinite, camera.mean)), f"finite numbers at mean of camera {camera.name}", camera.mean)
    lengths = (len(camera.mean), len(camera.std))
    fits = lengths[0] == lengths[1] > 0 and lengths[0] % 3 == 0
    _check(fits, f"three numbers for every encoder at mean and std of camera {camera.name}", lengths)


def _check_vector(part: ActionSpec | StateSpec, where: str) -> None:
    lengths = [len(part.names), len(part.units), len(part.norm.center), len(part.norm.scale)]
    _check(len(set(lengths)) == 1, f"names, units, norm.center and norm.scale of one length at {where}", lengths)
    _check(all(map(isfinite, part.norm.center)), f"finite numbers at {where}.norm.center", part.norm.center)
    fits = all(0 < scale < inf for scale in part.norm.scale)
    _check(fits, f"positive numbers at {where}.norm.scale", part.norm.scale)


def _check_prompt(prompt: PromptSpec, policy: PolicySpec) -> None:
    suffix, has_state = len(prompt.suffix), "{state}" in prompt.template
    _check(prompt.max_tokens > suffix, f"more than {suffix} at policy.prompt.max_tokens", prompt.max_tokens)
    bins = prompt.state_bins
    _check(
        bins >= 0 and has_state == (bins > 0), "policy.prompt.state_bins exactly where the template has {state}", bins
    )
    _check(not has_state or policy.state is not None, "a policy.state for the prompt's {state}", None)
    least = len(policy.state.names) if has_state and policy.state is not None else 1
    fits = not prompt.state_width or (has_state and prompt.state_width >= least)
    _check(fits, f"0 or at least {least}, with {{state}}, at policy.prompt.state_width", prompt.state_width)


def _check_action(action: ActionSpec, policy: PolicySpec) -> None:
    _check(len(action.meaning) == action.dim, f"{action.dim} entries at policy.action.meaning", len(action.meaning))
    found: object = (action.horizon, action.bins)
    _check(action.horizon > 0 and action.bins >= 0, "a positive policy.action.horizon and bins >= 0", found)
    _check(policy.decode != "flow" or not action.bins, "policy.action.bins 0 where decode is flow", action.bins)
    tokens = action.tokens
    if policy.decode == "autoregressive":
        _check(tokens is not None, "policy.action.tokens where decode is autoregressive", None)
    if tokens is not None:
        _check(action.bins > 0, "policy.action.bins where there are tokens", action.bins)
        reachable = 0 <= tokens.offset <= tokens.first - action.bins + 1 and tokens.first < tokens.offset + tokens.rows
        _check(reachable, f"{action.bins} bins among the rows at policy.action.tokens", tokens)


def _check_tower(name: str, tower: TowerSpec, policy: PolicySpec) -> None:
    fits = tower.width > 0 and 0 < tower.eps < inf and 0 < tower.theta < inf
    _check(fits, f"a positive width, eps and theta at towers.{name}", (tower.width, tower.eps, tower.theta))
    plain = tower.norm == "rms"
    _check(plain or not tower.norm_offset, f"a norm_offset with norm rms only at towers.{name}", tower.norm)
    _check(plain or policy.flow is not None, f"norm rms without a flow at towers.{name}", tower.norm)
    for index, layer in enumerate(tower.layers):
        where = f"towers.{name}.layers[{index}]"
        shared = layer.heads % layer.kv_heads == 0 if layer.kv_heads > 0 else layer.heads == 0
        fits = shared and min(layer.heads, layer.kv_heads, layer.mlp) >= 0 and layer.head_dim > 0
        _check(fits, f"a possible block (kv_heads divide heads) at {where}", layer)
        last = index == len(tower.layers) - 1
        _check(not layer.kv_only or last, f"a half block only at the end of towers.{name}", f"one at {index}")


def _check(holds: bool, expected: str, found: object) -> None:
    if not holds:
        raise StrictError(f"expected {expected}, found {found}")
