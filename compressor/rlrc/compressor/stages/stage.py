"""The stages of a compression as artifact -> artifact: load, evaluate, work, evaluate, write.

Every output's history holds the stage's full configuration and the success before and after it, measured on validation
scenes by argmax decoding. A stage that is interrupted leaves a run folder beside its output, from which the same
command goes on. Only the reference family has simulated demonstrations: policies of other families, which may come
straight from their official folders, learn from data sets and are not evaluated here, but by ``rl``. Nothing of the
simulator is imported for them.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch

from rlrc import interrupts
from rlrc.artifact import Draft, HistoryEntry, Manifest, create_artifact
from rlrc.checkpoint_folder import Flags
from rlrc.compressor.models import precision
from rlrc.compressor.models.policy import PolicyModule
from rlrc.compressor.models.precision import Wanted
from rlrc.compressor.models.tiny import FAMILY as REFERENCE
from rlrc.compressor.models.weights import parameters
from rlrc.compressor.quantize.quantize import Quantized
from rlrc.compressor.stages import training_data
from rlrc.compressor.stages.artifact_io import CURVES, quantized, write_policy
from rlrc.compressor.stages.sources import ArtifactSource, PolicySource, open_source, unquantized_only
from rlrc.compressor.training import distributed
from rlrc.compressor.training.run_state import RunState
from rlrc.errors import Interrupted, UserError

if TYPE_CHECKING:
    from rlrc.compressor.rl.simulation import Simulation
    from rlrc.compressor.training.batches import Batches


@dataclass(frozen=True)
class StageOptions:
    """What a stage needs besides its configuration."""

    evaluate: int = 8
    """validation episodes a task, before and after; 0 leaves them out"""
    workers: int = field(default_factory=distributed.cores)
    """processes that simulate (default: as many as there are cores)"""
    threads: int = field(default_factory=distributed.cores)
    """threads of torch (default: as many cores as this process may use, of several its share)"""
    precision: Wanted = "auto"
    """what products are computed in; auto measures which one this machine is quicker at, which takes a tenth of a
    second. A run that goes on keeps its own"""

    def __post_init__(self) -> None:
        for name, least in (("evaluate", 0), ("workers", 1), ("threads", 1)):
            if getattr(self, name) < least:
                raise UserError(f"expected --{name} >= {least}, found {getattr(self, name)}")
        if self.precision not in (choices := get_args(Wanted)):
            raise UserError(f"expected --precision {', '.join(choices)}, found {self.precision!r}")


@dataclass
class Stage:
    """One stage under way. ``simulation`` is None for families without a simulator here.

    ``draft`` is None in all processes but the first, which writes.
    """

    name: str
    source: PolicySource
    draft: Draft | None
    policy: PolicyModule
    simulation: Simulation | None
    run: RunState
    config: Any
    before: dict[str, Any]

    def simulated(self) -> Simulation:
        assert self.simulation is not None
        return self.simulation

    def demonstrations(self, config: training_data.TrainingSettings, first_seed: int = 0) -> Batches:
        """Without held-out ones: of the data set, or by the simulator's experts from this scene on."""
        if config.data:
            return training_data.of_data(self.source, config).batches
        from rlrc.compressor.rl.demonstrations import DemonstrationConfig

        demonstrations = DemonstrationConfig(config.demonstrations, first_seed)
        return self.simulated().batches(self.policy, demonstrations, config.seed)

    def finish(
        self, policy: PolicyModule, quantization: Quantized | None = None, exact: bool = False, **after: Any
    ) -> Manifest:
        """``exact``: see write_policy; ``after``: metrics of the stage itself."""
        if self.draft is None:
            return Manifest(policy.spec, policy.towers, parameters(policy), "float32")
        cpu_minutes = self.run.cpu_seconds() / 60
        if self.run.curve_file.exists():
            shutil.copy(self.run.curve_file, self.draft.file(f"{CURVES}/{len(self.source.history)}-{self.name}.jsonl"))
        success: dict[str, Any] = {}
        if self.simulation is not None:
            success = self.simulation.evaluate(policy if quantization is None else quantized(policy, quantization))
        entry = HistoryEntry(
            stage=self.name,
            config=dataclasses.asdict(self.config),
            version=version("rlrc"),
            parent=self.source.digest,
            cpu_minutes=round(cpu_minutes, 2),
            before=self.before,
            after=success | after,
            precision=dict(precision.used()),
        )
        history = (*self.source.history, entry)
        return write_policy(self.draft, policy, self.source.observations(), history, quantization, exact)


@contextmanager
def stage(
    name: str,
    path: Path,
    out: Path,
    config: Any,
    options: StageOptions,
    check: Callable[[PolicySource], object] = lambda source: None,
    flags: Flags | None = None,
    plays: bool = False,
    incomplete: bool = False,
) -> Iterator[Stage]:
    """Everything around a stage's own work.

    ``plays``: it needs the simulator, whatever the family. ``incomplete``: ``check`` supplies missing statistics. Of
    several processes (see rlrc.compressor.training.distributed) all do the work, and the first one evaluates and
    writes. Raises UserError before any work if input or output cannot be used, or if ``check`` raises it about the
    source.
    """
    source = open_source(path, flags or Flags(), incomplete)
    unquantized_only(source, path)
    check(source)
    torch.set_num_threads(options.threads)
    run = RunState(out.parent / f".{out.name}.run")
    with interrupts.raise_on_signal(), create_artifact(out) if distributed.rank() == 0 else nullcontext() as draft:
        if draft is not None:
            source.hand_on(draft)
        policy = source.load()
        run.open(name, source.digest or str(path), config, options.precision)
        try:
            with simulation_of(source, run, options, plays) as simulation:
                before: dict[str, Any] = {}
                if simulation is not None and draft is not None:
                    before = simulation.inherited(source.history) or simulation.evaluate(policy)
                run.start_clock(None if simulation is None else simulation.rollouts)
                yield Stage(name, source, draft, policy, simulation, run, config, before)
        except BaseException as error:
            if run.folder.exists() and not run.state_file.exists():  # nothing to go on with
                run.remove()
            if isinstance(error, KeyboardInterrupt) and not distributed.rank():
                raise Interrupted.by(error, run.continuation(name)) from None
            raise
    run.remove()
    distributed.wait()  # the artifact is there for whatever comes next


def simulation_of(
    source: PolicySource, run: RunState, options: StageOptions, plays: bool
) -> AbstractContextManager[Simulation | None]:
    """For policies of the reference family and stages that play; all others do without the simulator's packages."""
    if not isinstance(source, ArtifactSource) or not (plays or source.spec.family == REFERENCE):
        return nullcontext()
    from rlrc.compressor.rl.simulation import simulate

    return simulate(source.artifact, run.folder, options.workers, options.evaluate)
