"""What an artifact is, printed for people."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from rlrc.artifact import Artifact, PolicySpec, VerifiedSpec


def plain_console(stderr: bool = False) -> Console:
    """Prints what it is given: names and paths may hold brackets, which rich would take for its markup."""
    return Console(stderr=stderr, markup=False, highlight=False, soft_wrap=True)


def folder_bytes(artifact: Artifact) -> dict[str, int]:
    """Bytes of the files by their first folder: weights, graphs, tokenizer, golden.npz."""
    totals: dict[str, int] = {}
    for relative, file in artifact.manifest.files.items():
        top = relative.split("/")[0]
        totals[top] = totals.get(top, 0) + file.size
    return totals


def describe(artifact: Artifact, console: Console) -> None:
    manifest = artifact.manifest
    policy, action = manifest.policy, manifest.policy.action
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold")
    facts.add_column()
    sizes = ", ".join(f"{name} {size / 1e6:.2f} MB" for name, size in folder_bytes(artifact).items())
    cameras = "; ".join(f"{c.name} {c.height} x {c.width}, resize {c.resize}" for c in policy.cameras)
    actions = ", ".join(f"{n} ({m}, {u})" for n, m, u in zip(action.names, action.meaning, action.units, strict=True))
    state = (
        "none"
        if policy.state is None
        else ", ".join(f"{n} ({u})" for n, u in zip(policy.state.names, policy.state.units, strict=True))
    )
    bits = sorted(set(manifest.quantization.tensors.values())) if manifest.quantization else []
    stored = f"{manifest.dtype}" + (
        f" in groups of {manifest.quantization.group}, bits {bits}" if manifest.quantization else ""
    )
    for name, value in {
        "artifact": f"{artifact.path} ({artifact.digest[:12]})",
        "family": f"{policy.family}, {policy.decode} decoding",
        "parameters": f"{manifest.parameters:,} stored as {stored}",
        "bytes": sizes,
        "cameras": cameras,
        "state": state,
        "prompt": f"{policy.prompt.template!r}, at most {policy.prompt.max_tokens} tokens",
        "actions": f"{actions}; chunks of {action.horizon}, {f'{action.bins} bins' if action.bins else 'continuous'}",
        "graphs": "; ".join(f"{g.backend} {g.name} ({g.precision})" for g in manifest.graphs) or "none",
    }.items():
        facts.add_row(name, value)
    console.print(facts)

    for name, tower in manifest.towers.items():
        table = Table(
            "layer", "heads", "kv heads", "head dim", "MLP", title=f"{name}: width {tower.width}", title_justify="left"
        )
        for index, layer in enumerate(tower.layers):
            table.add_row(*map(str, (index, layer.heads, layer.kv_heads, layer.head_dim, layer.mlp)))
        console.print(table)
    for record in manifest.verified:
        print_record(record, policy, console)
    history = Table("stage", "version", "CPU min", "before", "after", title="history", title_justify="left")
    for entry in manifest.history:
        history.add_row(
            entry.stage, entry.version, f"{entry.cpu_minutes:.1f}", scalars(entry.before), scalars(entry.after)
        )
    console.print(history)
    graphs = any(graph.backend == "onnxruntime" for graph in manifest.graphs)
    console.print(
        f"next: rlrc {f'verify {artifact.path}' if graphs else f'export {artifact.path} OUT'}", soft_wrap=True
    )


def scalars(metrics: dict[str, Any]) -> str:
    """The single numbers among a stage's metrics; lists and tables are in --json."""
    integers = {name: f"{value:,}" for name, value in metrics.items() if isinstance(value, int)}
    floats = {name: f"{value:.4g}" for name, value in metrics.items() if isinstance(value, float)}
    return ", ".join(f"{name} {(integers | floats)[name]}" for name in metrics if name in integers | floats)


def print_record(record: VerifiedSpec, policy: PolicySpec, console: Console) -> None:
    errors = ", ".join(
        f"{name} {error:.3g}" for name, error in zip(policy.action.names, record.max_error, strict=False)
    )
    console.print(
        f"{record.backend}: {record.observations} observations, {record.token_flips} of {record.tokens} tokens "
        f"flipped, {record.gripper_flips} gripper flips; largest error {errors} (tolerated {record.tolerance:.3g}); "
        f"chunk jitter {record.chunk_jitter:.3g}"
    )
