"""Prints the description of an artifact, and tables that descriptions of checkpoints use too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from rlrc.artifact import Artifact, PolicySpec, TowerSpec, VerifiedSpec
from rlrc.artifact.describe import (
    describe_blocks,
    describe_prunable,
    folder_bytes,
    module_parameters,
    normalisation_lines,
    policy_rows,
    recorded_normalisation,
)
from rlrc.tables import print_rows, print_table


def describe(artifact: Artifact, console: Console) -> None:
    manifest = artifact.manifest
    quantization = manifest.quantization
    stored: str = manifest.dtype
    if quantization is not None:
        stored += f" in groups of {quantization.group}, bits {sorted(set(quantization.tensors.values()))}"
    recorded = recorded_normalisation(manifest.history)
    rows = {
        "artifact": f"{artifact.path} ({artifact.digest[:12]})",
        **policy_rows(manifest.policy),
        **({"normalisation": "\n".join(normalisation_lines(recorded))} if recorded else {}),
        "parameters": f"{manifest.parameters:,} stored as {stored}",
        "bytes": ", ".join(f"{name} {size / 1e6:.2f} MB" for name, size in folder_bytes(artifact).items()),
        "can be pruned": describe_prunable(manifest.towers),
        "graphs": "; ".join(f"{g.backend} {g.name} ({g.precision})" for g in manifest.graphs) or "none",
    }
    print_rows(rows, console)
    print_table(modules_table(module_parameters(artifact), manifest.towers), console)
    if manifest.verified:
        print_table(records_table(manifest.verified, manifest.policy), console)
    history = Table("stage", "version", "CPU min", "before", "after", title="history", title_justify="left")
    for entry in manifest.history:
        accelerator = () if entry.device in ("", "cpu") else (entry.device,)
        history.add_row(
            " ".join([entry.stage, *sorted(set(entry.precision.values())), *accelerator]),
            entry.version,
            f"{entry.cpu_minutes:.1f}",
            scalars(entry.before),
            scalars(entry.after),
        )
    print_table(history, console)
    console.print(
        f"next: rlrc {f'verify {artifact.path}' if manifest.graphs else f'export {artifact.path} OUT'}", soft_wrap=True
    )


def modules_table(parameters: Mapping[str, int], towers: Mapping[str, TowerSpec]) -> Table:
    """A row per module, with its parameters; equal blocks of a tower share one line."""
    table = Table("module", "parameters", "blocks")
    table.columns[1].justify = "right"
    for name in {**towers, **parameters}:
        size = f"{parameters[name]:,}" if name in parameters else ""
        table.add_row(name, size, "\n".join(describe_blocks(towers[name])) if name in towers else "")
    return table


def scalars(metrics: dict[str, Any]) -> str:
    """The scalar metrics of a stage; --json also has lists and tables."""
    integers = {name: f"{value:,}" for name, value in metrics.items() if isinstance(value, int)}
    floats = {name: f"{value:.4g}" for name, value in metrics.items() if isinstance(value, float)}
    return ", ".join(f"{name} {(integers | floats)[name]}" for name in metrics if name in integers | floats)


def records_table(
    records: Sequence[VerifiedSpec], policy: PolicySpec, title: str = "against the torch policy, in action units"
) -> Table:
    """A row per backend: how far its actions are from the reference's."""
    heads = ("graphs", "observations", "largest error", "tolerance", "token flips", "gripper flips", "jitter")
    table = Table(*heads, title=title, title_justify="left")
    for record in records:
        pairs = zip(policy.action.names, record.max_error, strict=False)
        flips = f"{record.token_flips} of {record.tokens}" if policy.action.bins else "\u2013"
        table.add_row(
            record.backend,
            str(record.observations),
            "\n".join(f"{name} {error:.3g}" for name, error in pairs),
            describe_tolerance(record),
            flips,
            str(record.gripper_flips) if "gripper" in policy.action.meaning else "\u2013",
            f"{record.chunk_jitter:.3g}",
        )
    return table


def describe_tolerance(record: VerifiedSpec) -> str:
    """The record's tolerance; if it is relative to the range, also the error to compare with it."""
    if record.range_tolerance is None:
        return f"{record.tolerance:.3g}"
    largest = max(record.range_error, default=float("nan"))
    return f"{record.range_tolerance:.1%} of the range\non 99 %: {largest:.2%}"


def format_trial_command(path: object, policy: PolicySpec) -> str:
    """The command to try exported graphs with: only the reference policy has a simulator here."""
    if policy.family == "tiny":
        return f"rlrc run {path} --env metaworld:drawer-open-v3"
    return f"rlrc infer {path} OBS.npz --out ACT.npz"
