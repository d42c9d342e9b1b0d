"""The state of a training run on disk, from which the same command resumes after Ctrl-C or a kill.

Of several processes only the first writes; all read.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor

from rlrc import interrupts
from rlrc.compressor.models import precision
from rlrc.compressor.training import distributed
from rlrc.errors import UserError
from rlrc.folders import replace_file

FORMAT = 2  # of the saved state
EVERY_S = 120.0  # seconds between two saves
SHARE = 0.1  # of the time, at most, is spent on saving: the state of a large policy may have 80 GB


class Simulators(Protocol):
    """Worker processes (rlrc.compressor.rl.rollout), whose CPU time counts as well."""

    cpu_seconds: float


class RunState:
    """A folder with the training state, the curve (one JSON line for each row) and the samples of DAgger rounds."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state_file = folder / "state.pt"
        self.curve_file = folder / "curve.jsonl"
        self.rows = 0  # of the curve
        self.saved: int | None = None  # the step of the saved state
        self.spent = 0.0  # CPU-seconds before this process
        self.rollouts: Simulators | None = None
        self.began = 0.0

    def open(
        self,
        stage: str,
        parent: str,
        config: Any,
        wanted: precision.PrecisionOption = "auto",
        usual: precision.PrecisionOption = "auto",
    ) -> None:
        """Start a run, or prepare to resume an interrupted one. Raises UserError if the folder is another run's.

        Sets the precision of this process: the one that the run started with, or ``wanted`` for a new run, or
        ``usual`` if that is "auto".
        """
        with distributed.main_process_first():
            if distributed.rank() == 0:
                self._open(stage, parent, config, wanted, usual)
        precision.use(json.loads((self.folder / "precision.json").read_text()))

    def _open(
        self, stage: str, parent: str, config: Any, wanted: precision.PrecisionOption, usual: precision.PrecisionOption
    ) -> None:
        if self.folder.exists() and not self.state_file.exists():
            self.remove()  # killed before the first save
        self.folder.mkdir(parents=True, exist_ok=True)
        identity = json.dumps(
            {"stage": stage, "parent": parent, "config": dataclasses.asdict(config), "format": FORMAT}, sort_keys=True
        )
        file, products = self.folder / "stage.json", self.folder / "precision.json"
        if file.exists() and (saved_run := json.loads(file.read_text())) != (run := json.loads(identity)):
            raise UserError(
                f"expected to go on with the same stage, input and configuration in {self.folder}, found another: "
                f"{_differences(saved_run, run)}; give what it began with, or remove it to start anew"
            )
        if products.exists():
            begun = json.loads(products.read_text())
            if wanted not in ("auto", *begun.values()):
                raise UserError(
                    f"expected --precision {' or '.join(sorted(set(begun.values())))}, which the run in {self.folder} "
                    f"began with, found {wanted}; leave it out, or remove {self.folder} to start anew"
                )
        else:
            products.write_text(
                json.dumps(precision.choose(usual if wanted == "auto" else wanted, *distributed.devices()))
            )
        file.write_text(identity)
        if self.state_file.exists():
            saved = torch.load(self.state_file, weights_only=True, mmap=True)
            self.spent, self.saved = saved["cpu_seconds"], saved["step"]

    def continuation(self, stage: str) -> str:
        """Message after an interruption: what the same command will do."""
        if self.saved is None:
            return f"nothing of {stage} is saved yet; the same command starts it again"
        unit = "iteration" if stage == "rl" else "step"
        return f"the same command resumes at {unit} {self.saved} of {stage}"

    def start_clock(self, rollouts: Simulators | None) -> None:
        self.rollouts, self.began = rollouts, time.process_time()
        if rollouts is not None:
            rollouts.cpu_seconds = 0.0

    def cpu_seconds(self) -> float:
        """CPU time of this stage: this process, its workers, and earlier processes up to their last save."""
        workers = self.rollouts.cpu_seconds if self.rollouts else 0.0
        return self.spent + time.process_time() - self.began + workers

    def common_state(self) -> dict[str, Any]:
        """The part of a saved state that all stages have."""
        return {"torch_rng": torch.get_rng_state(), "rows": self.rows}

    def save(self, step: int, **state: Any) -> None:
        """Save ``state`` and ``common_state()``; an earlier ``common_state()`` in ``state`` takes precedence."""
        if distributed.rank() == 0:
            values = {"step": step, "cpu_seconds": self.cpu_seconds(), **self.common_state(), **state}
            with interrupts.hold(), replace_file(self.state_file) as partial, partial.open("wb") as stream:
                torch.save(values, stream)  # to a stream, so that a full disk raises OSError
        self.saved = step

    def load(self) -> dict[str, Any] | None:
        """Read the saved state, if any. Restores torch's generator and drops later rows of the curve."""
        if not self.state_file.exists():
            return None
        saved: dict[str, Any] = torch.load(self.state_file, map_location="cpu", weights_only=True)
        torch.set_rng_state(saved["torch_rng"])
        self.rows, self.saved = saved["rows"], saved["step"]
        if distributed.rank():
            return saved
        rows = self.curve_file.read_text().splitlines() if self.curve_file.exists() else []
        self.curve_file.write_text("".join(row + "\n" for row in rows[: self.rows]))
        return saved

    def log(self, stage: str, step: int, **row: float) -> None:
        self.rows += 1
        if distributed.rank():
            return
        values = {name: round(float(value), 5) for name, value in row.items()}
        values["cpu_seconds"] = round(self.cpu_seconds(), 1)
        with self.curve_file.open("a") as file:
            file.write(json.dumps({"stage": stage, "step": step, **values}) + "\n")

    def remove(self) -> None:
        if distributed.rank() == 0:
            # Files of tensors that are still mapped cannot be removed from NFS yet.
            shutil.rmtree(self.folder, ignore_errors=True)


def _differences(saved: dict[str, Any], run: dict[str, Any]) -> str:
    """What a saved run began with and what would go on: "rate 0.0008 instead of 0.0005"."""
    saved, run = ({key: value for key, value in one.items() if key != "config"} | one["config"] for one in (saved, run))
    names = [name for name in sorted(saved | run) if saved.get(name) != run.get(name)]
    if saved["stage"] != run["stage"]:
        names = ["stage"]
    return ", ".join(f"{name} {saved.get(name)} instead of {run.get(name)}" for name in names)


class Keeper:
    """Saves the state of a run periodically, and on interruption that of the last complete step. A context manager.

    ``large()`` gives the weights and the optimiser's state, which change only while signals are held
    (interrupts.held). The rest of the state also changes during a step and is therefore passed at its end.
    """

    def __init__(self, run: RunState, team: distributed.Team, large: Callable[[], dict[str, Any]]) -> None:
        self.run, self.team, self.large = run, team, large
        self.step, self.small = 0, dict[str, Any]()
        self.last, self.pause = time.monotonic(), EVERY_S

    def __call__(self, step: int, **small: Any) -> None:
        """Call at the end of a step and before the first. Raises Interrupted if another process was interrupted."""
        self.step, self.small = step, self.run.common_state() | small
        due = time.monotonic() - self.last >= self.pause
        stop = interrupts.pending()
        if self.team.size > 1:  # all processes save and stop at the same step
            due, stop = (self.team.mean(_flag(value, self.team.device)) > 0 for value in (due, stop))
        if due or stop:
            self.save()
        if stop and self.team.size > 1:
            interrupts.stop()

    def save(self) -> None:
        """Save the last step, unless it is saved already."""
        began = time.monotonic()
        if self.step != (self.run.saved or 0):
            self.run.save(self.step, **self.small, **self.large())
        self.last = time.monotonic()
        self.pause = max(EVERY_S, (self.last - began) / SHARE)

    def __enter__(self) -> Keeper:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is None or (isinstance(error, KeyboardInterrupt) and self.team.size == 1):
            with interrupts.hold():
                self.save()


def _flag(value: bool, device: torch.device) -> Tensor:
    return torch.tensor(float(value), device=device)
