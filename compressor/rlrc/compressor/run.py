"""What a stage keeps on disk while it trains, so that the same command goes on after Ctrl-C or a kill.

Of several processes only the first writes; all of them read.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rlrc.compressor import distributed
from rlrc.errors import UserError

if TYPE_CHECKING:
    from rlrc.compressor.rollout import Rollouts


class Run:
    """A folder with the training state, the curve (one JSON line a row) and, for DAgger, the samples of each round."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state_file = folder / "state.pt"
        self.curve_file = folder / "curve.jsonl"
        self.spent = 0.0  # CPU-seconds before this process
        self.rollouts: Rollouts | None = None
        self.began = 0.0

    def open(self, stage: str, parent: str, config: Any) -> None:
        """Begin, or go on from the state an interrupted run saved. Refuses that of a run that did something else."""
        with distributed.first():
            if distributed.rank() == 0:
                self._open(stage, parent, config)

    def _open(self, stage: str, parent: str, config: Any) -> None:
        if self.folder.exists() and not self.state_file.exists():
            self.remove()  # it was killed before there was anything to go on with
        self.folder.mkdir(parents=True, exist_ok=True)
        identity = json.dumps({"stage": stage, "parent": parent, "config": dataclasses.asdict(config)}, sort_keys=True)
        file = self.folder / "stage.json"
        if file.exists() and json.loads(file.read_text()) != json.loads(identity):
            raise UserError(
                f"expected to go on with the same stage, input and configuration in {self.folder}, found another; "
                "remove it to start anew"
            )
        file.write_text(identity)
        if self.state_file.exists():
            self.spent = torch.load(self.state_file, weights_only=True)["cpu_seconds"]

    def start_clock(self, rollouts: Rollouts | None) -> None:
        self.rollouts, self.began = rollouts, time.process_time()
        if rollouts is not None:
            rollouts.cpu_seconds = 0.0

    def cpu_seconds(self) -> float:
        """CPU time of this stage so far: this process, its workers, and earlier processes until their last save."""
        workers = self.rollouts.cpu_seconds if self.rollouts else 0.0
        return self.spent + time.process_time() - self.began + workers

    def save(self, step: int, **state: Any) -> None:
        if distributed.rank():
            return
        partial = self.state_file.with_suffix(".partial")
        torch.save(
            {"step": step, "cpu_seconds": self.cpu_seconds(), "torch_rng": torch.get_rng_state(), **state}, partial
        )
        partial.replace(self.state_file)

    def load(self) -> dict[str, Any] | None:
        """The saved state, if any; drops the curve's rows after it and restores torch's generator."""
        if not self.state_file.exists():
            return None
        saved = torch.load(self.state_file, map_location="cpu", weights_only=True)
        torch.set_rng_state(saved["torch_rng"])
        if distributed.rank():
            return saved
        rows = self.curve_file.read_text().splitlines() if self.curve_file.exists() else []
        self.curve_file.write_text("".join(row + "\n" for row in rows if json.loads(row)["step"] <= saved["step"]))
        return saved

    def log(self, stage: str, step: int, **row: float) -> None:
        if distributed.rank():
            return
        values = {name: round(float(value), 5) for name, value in row.items()}
        values["cpu_seconds"] = round(self.cpu_seconds(), 1)
        with self.curve_file.open("a") as file:
            file.write(json.dumps({"stage": stage, "step": step, **values}) + "\n")

    def remove(self) -> None:
        if distributed.rank() == 0:
            shutil.rmtree(self.folder)
