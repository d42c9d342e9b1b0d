"""What all stages share: open the input, evaluate, do the stage's work, evaluate again, write the output.

The history of every output holds the stage's configuration and the success before and after it, on validation scenes.
An interrupted stage leaves a run folder next to its output, from which the same command resumes. Only the reference
family has a simulator here. Policies of other families learn from data sets and are not evaluated, except by ``rl``; no
package of the simulator is imported for them.
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
from rlrc.compressor.models import device, precision
from rlrc.compressor.models.nn.linear import widen
from rlrc.compressor.models.policy import PolicyModule
from rlrc.compressor.models.precision import PrecisionOption
from rlrc.compressor.models.tiny import FAMILY as REFERENCE
from rlrc.compressor.models.weights import PolicyWeights
from rlrc.compressor.quantize.quantize import QuantizedWeights
from rlrc.compressor.stages import memory
from rlrc.compressor.stages.artifact_io import CURVES, apply_quantization, write_policy
from rlrc.compressor.stages.sources import ArtifactSource, PolicySource, check_unquantized, open_source, shapes
from rlrc.compressor.stages.training_data import TrainingSettings, load_data
from rlrc.compressor.training import defaults, distributed
from rlrc.compressor.training.defaults import Chosen, Options
from rlrc.compressor.training.run_state import RunState
from rlrc.errors import Interrupted, UserError
from rlrc.ranges import check_range
from rlrc.tables import plain_console

if TYPE_CHECKING:
    from rlrc.compressor.rl.simulation import Simulation
    from rlrc.compressor.training.batches import Batches, TrainingData
    from rlrc.compressor.training.config import SFTConfig  # imports rlrc.envs
    from rlrc.compressor.training.sft import BeforeStep


@dataclass(frozen=True)
class StageOptions:
    """Options that all stages have."""

    evaluate: int = 8
    """validation episodes of each task, before and after the stage; 0: no evaluation"""
    workers: int = field(default_factory=distributed.cores)
    """processes that simulate (default: the number of cores)"""
    threads: int = field(default_factory=distributed.cores)
    """threads of torch (default: the number of cores that this process may use, its share if there are several)"""
    precision: PrecisionOption = "auto"
    """precision of matrix products; auto measures the faster one on this machine, in a tenth of a second; for training
    ACT it is float32, as its authors take. A resumed run keeps its precision"""
    device: str = "auto"
    """where torch computes: auto (the accelerator that torch finds, else the CPU), cpu, cuda, cuda:N or mps"""

    def __post_init__(self) -> None:
        device.pick(self.device)
        check_range(self, "--", "evaluate", at_least=0)
        check_range(self, "--", "workers", "threads", at_least=1)
        if self.precision not in (choices := get_args(PrecisionOption)):
            raise UserError(f"expected --precision {', '.join(choices)}, found {self.precision!r}")


@dataclass
class Stage:
    """A running stage. ``simulation`` is None for families without a simulator.

    ``draft`` is None in all processes except the first, which writes.
    """

    name: str
    source: PolicySource
    draft: Draft | None
    policy: PolicyModule
    simulation: Simulation | None
    run: RunState
    config: Any
    before: dict[str, Any]
    defaults: Chosen
    """the settings of ``config`` that the user did not give"""

    @property
    def device(self) -> torch.device:
        """Where to compute. ``policy`` is on the CPU at first."""
        return device.current()

    def require_simulation(self) -> Simulation:
        assert self.simulation is not None
        return self.simulation

    def demonstrations(self, config: TrainingSettings, first_seed: int = 0) -> Batches:
        """Without held-out ones: of the data set, or of the simulator's experts from this scene on."""
        if config.data:
            return load_data(self.source, config).batches
        from rlrc.compressor.rl.demonstrations import DemonstrationConfig

        demonstrations = DemonstrationConfig(config.demonstrations, first_seed)
        return self.require_simulation().batches(self.policy, demonstrations, config.seed)

    def training_data(self, config: SFTConfig) -> tuple[TrainingData, BeforeStep | None]:
        """Training and held-out data of the data set, or of the simulator's experts with the DAgger rounds."""
        if config.data:
            return load_data(self.source, config, config.held_out, config.batch), None
        return self.require_simulation().training_data(self.policy, config, self.run)

    def learned(self) -> bool:
        """Whether the policy was trained, by rlrc or by its authors, and not cut since."""
        trained = {"official", "sft", "distill", "rl"}
        last = [entry for entry in self.source.history if entry.stage in trained or is_cut(entry)][-1:]
        return bool(last) and not is_cut(last[0])

    def finish(
        self,
        policy: PolicyModule | PolicyWeights,
        quantization: QuantizedWeights | None = None,
        exact: bool = False,
        **after: Any,
    ) -> Manifest:
        """Evaluate and write the policy. ``exact``: see write_policy; ``after``: metrics for the history.

        It is written from the CPU, whose answers define the artifact.
        """
        weights = PolicyWeights.of(policy)
        if self.draft is None:
            return Manifest(policy.spec, policy.towers, weights.count(), "float32")
        self.source.check_unchanged()
        cpu_minutes = self.run.cpu_seconds() / 60
        if self.run.curve_file.exists():
            shutil.copy(self.run.curve_file, self.draft.file(f"{CURVES}/{len(self.source.history)}-{self.name}.jsonl"))
        success: dict[str, Any] = {}
        if self.simulation is not None:
            stored = weights.build() if quantization is None else apply_quantization(weights, quantization)
            success = self.simulation.evaluate(widen(stored))
        sources = {name: setting.source for name, setting in self.defaults.items()}
        entry = HistoryEntry(
            stage=self.name,
            config=dataclasses.asdict(self.config),
            version=version("rlrc"),
            parent=self.source.digest,
            cpu_minutes=round(cpu_minutes, 2),
            before=self.before,
            after=success | after | ({"defaults": sources} if sources else {}),
            precision=dict(precision.current()),
            device=device.describe(self.device),
        )
        history = (*self.source.history, entry)
        return write_policy(self.draft, weights, self.source.observations(), history, quantization, exact)


@contextmanager
def stage(
    name: str,
    path: Path,
    out: Path,
    config: Any,
    options: StageOptions,
    check: Callable[[PolicySource, Any], object] = lambda source, config: None,
    flags: Flags | None = None,
    plays: bool = False,
    incomplete: bool = False,
) -> Iterator[Stage]:
    """Run a stage's work in a context, with everything before and after it.

    ``check(source, config)`` raises UserError before any work; its ``config`` is complete, as is that of the Stage: a
    training stage's settings that were not given are those of the policy's family. ``plays``: the stage needs the
    simulator for every family. ``incomplete``: ``check`` supplies missing statistics. Of several processes (see
    distributed.py) all do the work, and the first evaluates and writes. Raises UserError before any work if input or
    output cannot be used.
    """
    device.use(options.device)
    source = open_source(path, flags or Flags(), incomplete)
    check_unquantized(source, path)
    usual: PrecisionOption = "auto"
    trains = isinstance(config, Options)
    config, chosen = complete_config(config, source)
    if trains:
        usual = defaults.precision_option(source.spec.family)
        if options.precision == "auto":
            chosen["precision"] = defaults.precision(source.spec.family)
    check(source, config)
    torch.set_num_threads(options.threads)
    run = RunState(out.parent / f".{out.name}.run")
    with interrupts.raise_on_signal(), create_artifact(out) if distributed.rank() == 0 else nullcontext() as draft:
        if draft is not None:
            source.copy_files(draft)
        policy = source.load()
        run.open(name, source.identity, config, options.precision, usual)
        try:
            with simulation_of(source, run, options, plays) as simulation:
                if distributed.rank() == 0:
                    for line in defaults.format_lines(name, chosen):
                        plain_console(stderr=True).print(line)
                before: dict[str, Any] = {}
                if simulation is not None:
                    widen(policy)
                if simulation is not None and draft is not None:
                    before = simulation.success_of(source.history) or simulation.evaluate(policy)
                run.start_clock(None if simulation is None else simulation.rollouts)
                yield Stage(name, source, draft, policy, simulation, run, config, before, chosen)
        except BaseException as error:
            if run.folder.exists() and not run.state_file.exists():  # nothing to resume
                run.remove()
            if isinstance(error, KeyboardInterrupt) and not distributed.rank():
                raise Interrupted.by(error, run.continuation(name)) from None
            raise
    run.remove()
    distributed.wait_for_all()  # all processes find the artifact afterwards


def is_cut(entry: HistoryEntry) -> bool:
    """Whether a stage removed something that actions depend on."""
    return entry.stage == "prune" and not entry.config.get("lossless")


def complete_config(config: Any, source: PolicySource) -> tuple[Any, Chosen]:
    """A training stage's complete configuration, and the settings that were not given: see defaults.complete."""
    if not isinstance(config, Options):
        return config, {}
    return defaults.complete(config, source.spec.family, memory.count_numbers(shapes(source)))


def simulation_of(
    source: PolicySource, run: RunState, options: StageOptions, plays: bool
) -> AbstractContextManager[Simulation | None]:
    """The simulator, for the reference family and for stages that play. Others do not import its packages."""
    if not isinstance(source, ArtifactSource) or not (plays or source.spec.family == REFERENCE):
        return nullcontext()
    from rlrc.compressor.rl.simulation import simulate

    return simulate(source.artifact, run.folder, options.workers, options.evaluate)
