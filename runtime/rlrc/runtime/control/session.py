"""Everything that `rlrc run` opens: robot, watchdog, guard, inference, recorder, planner; and its episodes."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlrc import realtime
from rlrc.artifact import Artifact, PolicySpec
from rlrc.envs.seeds import EVALUATION
from rlrc.errors import UserError
from rlrc.robots import replay
from rlrc.robots.driver import Driver, describe_driver_error, describe_exception
from rlrc.robots.instruction import InstructionOverride
from rlrc.robots.recorder import Recorder
from rlrc.robots.robot import Robot, RobotError
from rlrc.robots.simulator import SimulatorRobot
from rlrc.runtime.board.monitor import Board
from rlrc.runtime.control import telemetry
from rlrc.runtime.control.chunks import Chunks, Strategy
from rlrc.runtime.control.control_loop import ControlLoop, LoopHooks, LoopTiming
from rlrc.runtime.control.inference_process import InferenceProcess
from rlrc.runtime.control.planner import Planner
from rlrc.runtime.control.rearming import RearmController
from rlrc.runtime.control.service_manager import Supervisor
from rlrc.runtime.control.step import Show
from rlrc.runtime.control.stop_switch import StopSwitch
from rlrc.runtime.control.watchdog import Watchdog
from rlrc.runtime.inference.backends import Backend
from rlrc.runtime.inference.policy import LocalPolicy
from rlrc.runtime.safety import profile
from rlrc.runtime.safety.guard import Guard

REMEMBERED = 200_000  # steps that --log holds, about an hour at 50 Hz
SIMULATED_LATE = 5.0  # periods: a simulator shares this machine


@dataclass(frozen=True)
class SessionConfig:
    """What to control, with which policy, and how. Field docstrings are the help of `rlrc run`."""

    path: Path
    """the artifact"""
    env: str | None = None
    """simulator to control: metaworld:TASK, gym:ID or libero:SUITE/NUMBER, such as metaworld:drawer-open-v3"""
    env_mapping: Path | None = None
    """TOML file that maps the environment's values to the policy's, for gym:ID"""
    driver: str | None = None
    """robot to control instead: your MODULE:FUNCTION, called with the policy's description and --instruction"""
    replay: Path | None = None
    """LeRobotDataset to replay instead; at the end the commands are compared with the recorded ones"""
    episode: int = 0
    """episode of the data set to play"""
    cameras: dict[str, str] = field(default_factory=dict)
    """pairs of a camera of the policy and one of the data set, if their names differ; none: leave it out"""
    instruction: str = ""
    """the task, in words"""
    hz: float | None = None
    """steps a second; 0 plays a simulator as fast as possible, in lockstep, without a guard (default: the simulator's
    or the data set's own rate)"""
    strategy: Strategy | None = None
    """how chunks follow each other: synchronous, where the robot waits for the next one (the default); replace by the
    newest (the default of --replay, which does not wait); ensemble, their average; continue, where the newest continues
    what is being executed (real-time chunking)"""
    execute: int | None = None
    """steps of every chunk to play before the next inference (default: all if synchronous, else as few as possible)"""
    episodes: int = 1
    """episodes to play in a simulator"""
    seed: int | None = None
    """seed of the first episode, the next ones count up (default: the first seed kept for evaluation)"""
    steps: int | None = None
    """steps after which to end (default: a robot runs until it is stopped)"""
    late: float | None = None
    """periods that a state or a picture may be old before the robot is stopped; more for cameras slower than --hz
    (default: 1.5; 5 for a simulator or a recording, which share this machine)"""
    patience: float = LoopTiming.patience
    """seconds that the robot is held without an action before it is stopped"""
    record: Path | None = None
    """write every step into a new LeRobotDataset"""
    backend: Backend | None = None
    """which of the artifact's graphs to run (default: the first there are of onnxruntime, tensorrt, gguf)"""
    threads: int = 1
    """threads of the engine"""
    rearm: bool = False
    """hold the robot after a stop, until the operator re-arms it (R, or the page) or ends the run (q, Ctrl-C)"""

    @property
    def seeds(self) -> range:
        first = EVALUATION.start if self.seed is None else self.seed
        return range(first, first + self.episodes)


class ControlSession:
    """Opens everything in its order; ``stack`` closes it. Raises UserError for options that do not fit.

    ``on_hang`` is called in the watchdog's thread, with the session and the reason, if the loop hangs for good.
    ``report`` prints what becomes of re-arming.
    """

    def __init__(
        self,
        config: SessionConfig,
        artifact: Artifact,
        limits: profile.RobotProfile,
        stack: ExitStack,
        switch: StopSwitch,
        on_hang: Callable[[ControlSession, str], None],
        report: Callable[[str], None] = print,
    ) -> None:
        self.config, self.spec, self.switch = config, artifact.manifest.policy, switch
        self.supervisor = Supervisor.from_environment()
        self.periods = profile.periods(limits)
        self.failures: list[str] = []
        """what failed in the robot or the loop, in words"""
        self.played: list[dict[str, Any]] = []
        self._on_hang, self._is_open = on_hang, False

        opened = _open_robot(config, self.spec)
        self.simulator = opened if isinstance(opened, SimulatorRobot) else None
        self.replay = opened if isinstance(opened, replay.ReplayRobot) else None
        self.driver = Driver(opened)
        self.watchdog = Watchdog(self.driver, self._handle_hang)
        stack.callback(self._close)

        paced = self.simulator or self.replay
        own_hz = paced.hz if paced else None
        self.timing = _timing(config, own_hz)
        self.guard = self._build_guard(limits, own_hz or self.timing.hz)
        strategy = config.strategy or ("replace" if self.replay else "synchronous")
        chunks = Chunks(strategy, self.spec.action.horizon, config.execute, self.periods)

        if self.simulator:
            self.simulator.reset(config.seeds[0])
        self.inference = InferenceProcess(
            LocalPolicy.load, (config.path, config.threads, True, config.backend), _first_observation(self.driver)
        )
        stack.callback(self.inference.close)
        self.planner = Planner(self.inference, chunks, self.spec)
        self.rearming = RearmController(switch, self.guard, self.planner, report) if config.rearm else None

        self.recorder = Recorder(self.driver, self.spec, self.timing.hz, config.record) if config.record else None
        self.robot: Robot = self.recorder or self.driver
        self.instruction_override: InstructionOverride | None = None
        if self.spec.prompt is not None:
            begin = self.recorder.begin if self.recorder else lambda task: None
            self.robot = self.instruction_override = InstructionOverride(self.robot, begin)
        self.board = stack.enter_context(Board.monitor())
        self.telemetry = telemetry.Telemetry(REMEMBERED, self.spec.action.dim)
        self._is_open = True

    @property
    def process_ids(self) -> list[int]:
        """The processes that run in parallel with the loop, and that it needs."""
        return [self.inference.pid] + ([self.simulator.pid] if self.simulator else [])

    def play_episode(self, seed: int, show: Show | None = None) -> None:
        """Plays a simulator or a recording until it is over, a robot until it is stopped."""
        realtime.collect_garbage()
        self.inference.reset()
        if self.simulator is not None:
            self.simulator.reset(seed)
        with self.watchdog.watching(self.timing.gap * self.timing.period):
            self._run_loop(show)
        if self.simulator is not None:
            self.played.append({"seed": seed, "success": self.simulator.success, "steps": self.simulator.steps})

    def _run_loop(self, show: Show | None) -> None:
        sensed = self.robot.sense()
        if self.recorder is not None:
            instruction = (sensed.observation.get("instruction") if sensed else None) or self.config.instruction
            self.recorder.begin(instruction or "run")
        hooks = LoopHooks(
            self.switch.stop_reason, sleep=self.switch.wait, beat=self._beat, show=show, rearming=self.rearming
        )
        control_loop = ControlLoop(self.robot, self.planner, self.guard, self.telemetry, self.spec, self.timing, hooks)
        try:
            control_loop.run(self._is_over, self.config.steps, rest=self.simulator is None and self.replay is None)
        finally:
            self.failures += control_loop.failures

    def _beat(self) -> None:
        self.watchdog.beat()
        self.supervisor.beat()
        self.switch.reclaim_signals()

    def _handle_hang(self, reason: str) -> None:
        if self._is_open:
            self._on_hang(self, reason)
        else:  # the session failed to open, and the driver does not close: there is no log yet
            print(reason, file=sys.stderr)

    def _is_over(self) -> bool:
        if self.simulator is not None:
            return self.simulator.over or self.simulator.steps >= self.simulator.horizon
        return self.replay is not None and self.replay.over

    def _close(self) -> None:
        """A driver that cannot be closed must not cost the log."""
        try:
            with self.watchdog.closing():
                self.driver.close()
        except BaseException as error:
            self.failures.append(f"closing the robot failed: {describe_driver_error(error)}")

    def _build_guard(self, limits: profile.RobotProfile, hz: float) -> Guard:
        state = self.spec.state
        names, units = ((), ()) if state is None else (state.names, state.units)
        if self.replay:
            limits = replay.drop_tracking(limits)
        return Guard(limits, hz, self.spec.action, names, units, self.timing.gap, self.replay is None)


def _timing(config: SessionConfig, own_hz: float | None) -> LoopTiming:
    """``own_hz``: the rate of a simulator or a recording."""
    if config.hz is None and own_hz is None:
        raise UserError("expected --hz with a robot's driver, found none; give the rate of its commands")
    hz = config.hz if config.hz is not None else float(own_hz or 0)
    late = (SIMULATED_LATE if own_hz else LoopTiming.late) if config.late is None else config.late
    return LoopTiming(hz, hz / own_hz if own_hz else 1.0, late, config.patience)


def _open_robot(config: SessionConfig, spec: PolicySpec) -> Any:
    """The robot, simulator or recording that ``config`` names. Raises UserError if it does not open."""
    if config.env is not None:
        return SimulatorRobot(config.env, spec, config.env_mapping)
    if config.replay is not None:
        return replay.ReplayRobot(config.replay, config.episode, spec, config.cameras)
    module, _, function = str(config.driver).partition(":")
    sys.path.insert(0, "")  # a driver may be in the folder where the command is given
    try:
        open_robot = getattr(importlib.import_module(module), function)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # importing a module runs its code, which may raise anything
        raise UserError(
            f"expected a driver MODULE:FUNCTION, found {config.driver}: {describe_exception(error)}; see docs/robots.md"
        ) from None
    try:
        return open_robot(spec, config.instruction)
    except (UserError, RobotError, KeyboardInterrupt):
        raise
    except BaseException as error:
        found = describe_exception(error)
        raise UserError(
            f"expected the driver {config.driver} to open, found: {found}; correct it (docs/robots.md)"
        ) from None


def _first_observation(robot: Robot) -> Any:
    sensed = robot.sense()
    if sensed is None:
        raise UserError("expected a first state from the robot's driver, found none; let it wait for one when it opens")
    return sensed.observation
