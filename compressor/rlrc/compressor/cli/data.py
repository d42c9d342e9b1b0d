"""Commands about data sets: data inspect, data demonstrations."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from tyro.conf import OmitArgPrefixes, Positional

from rlrc import artifact as artifacts
from rlrc.artifact import PolicySpec
from rlrc.checkpoint_folder import Flags, is_checkpoint
from rlrc.datasets import inspection
from rlrc.datasets.lerobot import Dataset
from rlrc.errors import UserError
from rlrc.folders import check_output
from rlrc.progress import progress, status
from rlrc.runtime.cli.policy import fail_check
from rlrc.tables import plain_console


@dataclass(frozen=True)
class InspectDataset:
    """Show the contents of a LeRobotDataset v3.0 folder, its likely errors, and whether it fits a policy."""

    path: Positional[Path]
    """the folder that has meta/info.json"""
    policy: Path | None = None
    """an artifact or an official checkpoint: check whether the data set fits it; exit code 1 if not"""
    cameras: dict[str, str] = field(default_factory=dict)
    """pairs of a camera of the policy and one of the data set, where their names differ; none: leave the camera out"""
    json: bool = False
    """print everything as JSON"""
    checkpoint: OmitArgPrefixes[Flags] = field(default_factory=Flags)

    def run(self) -> int:
        dataset = Dataset.open(self.path)
        spec = None if self.policy is None else policy_spec(self.policy, self.checkpoint, dataset, self.cameras)
        with status(f"reading {self.path}"):
            found = inspection.describe(dataset)
            if spec is not None:
                found["policy"] = inspection.check_fit(dataset, spec, self.cameras)
        dataset.close()
        if self.json:
            print(json.dumps(found, indent=1))
        else:
            inspection.show(found, plain_console())
        if spec is not None and not found["policy"]["fits"]:
            for reason in found["policy"]["reasons"]:
                fail_check(reason)
            return 1
        return 0


@dataclass(frozen=True)
class Demonstrations:
    """Record scripted experts in the simulator as a LeRobotDataset v3.0 folder, one frame for each control step."""

    out: Positional[Path]
    """folder to write; must not exist"""
    episodes_per_task: int = 2
    """episodes of each task, with increasing noise on the executed actions"""
    tasks: tuple[str, ...] = ()
    """tasks to record, such as drawer-open-v3 (default: all)"""
    size: int = 96
    """height and width of the pictures"""
    video: bool = False
    """store the pictures as video, which is smaller but lossy, instead of as PNG"""

    def run(self) -> None:
        check_output(self.out)
        from rlrc.compressor.rl.expert_dataset import record  # imported late: it needs the simulator
        from rlrc.envs.metaworld import TASKS

        tasks, played = self.tasks or tuple(TASKS), list[bool]()

        def report(task: str, steps: int, success: bool) -> None:
            played.append(success)
            update(len(played), f"{task}: {steps} steps")

        with progress("episodes", len(tasks) * self.episodes_per_task) as update:
            record(self.out, tasks, self.episodes_per_task, self.size, self.video, report=report)
        print(f"{self.out}: {len(played)} episodes, {sum(played)} successful; next: rlrc data inspect {self.out}")


def policy_spec(path: Path, flags: Flags, dataset: Dataset, cameras: Mapping[str, str]) -> PolicySpec:
    """The description of the policy of an artifact or a checkpoint folder. Reads no weights.

    A base checkpoint without statistics gets those of the data set, as ``rlrc sft`` does.
    """
    if is_checkpoint(path, flags):
        from rlrc.compressor.checkpoints.lerobot import dataset_statistics  # imported late: it needs torch
        from rlrc.compressor.stages.sources import open_source

        source = open_source(path, flags, incomplete=True)
        names = dataset_statistics.find_undecided(source.spec, source.normalisation)
        with suppress(UserError):  # inspection.fit reports what does not match
            return dataset_statistics.adopt_statistics(source.spec, source.normalisation, names, dataset, cameras)[0]
        return source.spec
    return artifacts.load(path, verify=()).manifest.policy
