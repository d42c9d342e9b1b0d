"""Checkpoint folders in the commands `rlrc inspect`, `rlrc infer` and `rlrc write-back`."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

from tyro.conf import OmitArgPrefixes, Positional

from rlrc import artifact as artifacts
from rlrc.checkpoint_folder import Flags
from rlrc.compressor.checkpoints import geometry as geometries
from rlrc.compressor.checkpoints import hub, reader
from rlrc.compressor.checkpoints.folder import open_folder, options_of
from rlrc.compressor.checkpoints.prismatic import norm_stats
from rlrc.compressor.checkpoints.torch_policy import TorchPolicy
from rlrc.compressor.checkpoints.write_back import write_checkpoint
from rlrc.compressor.cli.describe import describe_checkpoint, print_checkpoint
from rlrc.compressor.cli.threads import set_threads
from rlrc.compressor.models import device
from rlrc.compressor.stages.artifact_io import load_policy
from rlrc.folders import check_output
from rlrc.tables import plain_console


def inspect(path: Path | None, geometry: str | None, flags: Flags, as_json: bool) -> None:
    """Prints what a folder holds, or the real dimensions of an official checkpoint. Reads no weights."""
    if geometry is not None:
        folder, options = geometries.folder(geometry)
    else:
        assert path is not None
        folder, options = open_folder(hub.locate(path)), replace(options_of(flags), incomplete=True)
    data_sets, chosen = sorted(norm_stats.data_sets(folder)), tuple[str, ...]()
    if len(data_sets) > 1 and options.unnorm_key is None:
        options = replace(options, unnorm_key=data_sets[0])  # all have the same form; infer requires a choice
        chosen = (f"the statistics of {data_sets[0]}, one of {len(data_sets)} data sets (--unnorm-key)",)
    layout = reader.layout(folder, options)
    layout = replace(layout, assumed=chosen + layout.assumed)
    built = reader.build(layout)
    reader.check(folder, layout, built)
    facts = describe_checkpoint(folder, layout, built, data_sets)
    if as_json:
        print(json.dumps(facts, indent=1))
    else:
        print_checkpoint(facts, layout, console := plain_console())
        if geometry is None:
            missing = [how for steps in layout.normalisation.values() for how in steps if how.missing]
            key = " --unnorm-key KEY" if missing or chosen else ""
            following = f"rlrc infer {path} OBS.npz --out ACT.npz{key}, or rlrc prune {path} OUT{key}"
            if not all(how.groups for how in missing):
                following = f"rlrc sft {path} OUT --data FOLDER, which uses the statistics of your data"
            console.print(f"next: {following}")


def policy(path: Path, flags: Flags, threads: int, where: str) -> TorchPolicy:
    """The policy of a checkpoint folder, for inference with torch on this device (see device.pick)."""
    set_threads(threads)
    return TorchPolicy.from_folder(open_folder(hub.locate(path)), options_of(flags), device.use(where))


@dataclass(frozen=True)
class WriteBack:
    """Write an artifact's weights in the format of its original checkpoint, so that other tools load them."""

    path: Positional[Path]
    """the artifact; its geometry must be that of the checkpoint (not pruned)"""
    out: Positional[Path]
    """folder to write; must not exist"""
    like: Path
    """the checkpoint's folder (or owner/name on the hub) that the artifact was made from"""
    checkpoint: OmitArgPrefixes[Flags] = field(default_factory=Flags)

    def run(self) -> None:
        check_output(self.out)
        folder = open_folder(hub.locate(self.like))
        write_checkpoint(load_policy(artifacts.load(self.path)), folder, self.out, options_of(self.checkpoint))
        print(f"{self.out}: the weights of {self.path} in the format of {folder.path}; next: rlrc inspect {self.out}")
