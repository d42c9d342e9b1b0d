"""What `rlrc run` has open: robot, policy, guard, recorder, for one episode after the other."""

from __future__ import annotations

import importlib
import sys
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlrc import realtime
from rlrc.artifact import Artifact, PolicySpec
from rlrc.envs.seeds import EVALUATION
from rlrc.errors import UserError
from rlrc.robots import replay
from rlrc.robots.driver import Driver, named, said
from rlrc.robots.instructed import Instructed
from rlrc.robots.recorder import Recorder
from rlrc.robots.robot import Robot, RobotError
from rlrc.robots.simulator import SimulatorRobot
from rlrc.runtime.board.monitor import Board
from rlrc.runtime.control import telemetry
from rlrc.runtime.control.chunks import Chunks, Strategy
from rlrc.runtime.control.control_loop import ControlLoop, LoopTiming, Show
from rlrc.runtime.control.inference_process import InferenceProcess
from rlrc.runtime.control.rearming import RearmController
from rlrc.runtime.control.service_manager import Supervisor
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
    """What is driven, by which policy, and how. Field docstrings are the help of `rlrc run`."""

    path: Path
    """the artifact"""
    env: str | None = None
    """simulator to control: metaworld:TASK, gym:ID or libero:SUITE/NUMBER, such as metaworld:drawer-open-v3"""
    env_mapping: Path | None = None
    """TOML file that says how the environment's values become the policy's, for gym:ID"""
    driver: str | None = None
    """robot to control instead: MODULE:FUNCTION of yours, called with the policy's description and --instruction"""
    replay: Path | None = None
    """LeRobotDataset to play instead: at the end the commands are compared with what was recorded"""
    episode: int = 0
    """episode of the data set to play"""
    cameras: dict[str, str] = field(default_factory=dict)
    """pairs of a camera of the policy and one of the data set, where their names differ; none: do without it"""
    instruction: str = ""
    """what a robot is to do, in words"""
    hz: float | None = None
    """steps a second; 0 plays a simulator as fast as possible, in lockstep, without a guard (default: the simulator's
    or the data set's own rate)"""
    strategy: Strategy | None = None
    """how chunks follow each other: synchronous, where the robot waits for the next one (the default); replace by the
    newest (the default of --replay, which does not wait); ensemble, their average; continue, where the newest is made
    to go on from what is being executed (real-time chunking)"""
    execute: int | None = None
    """steps of every chunk to play before the next inference (default: synchronously all, else as few as can be)"""
    episodes: int = 1
    """episodes to play in a simulator"""
    seed: int | None = None
    """seed of the first episode, the next ones count up (default: the first seed kept for evaluation)"""
    steps: int | None = None
    """steps after which to end (default: a robot's run ends when it is stopped)"""
    late: float | None = None
    """periods that a state or a picture may be old before that stops the robot; more for cameras slower than --hz
    (default: 1.5; 5 for a simulator or a recording, which share this machine)"""
    patience: float = LoopTiming.patience
    """seconds that the robot is held for want of an action before that stops it"""
    record: Path | None = None
    """write every step into a new LeRobotDataset"""
    backend: Backend | None = None
    """which of the artifact's graphs to run (default: the first there are of onnxruntime, tensorrt, gguf)"""
    threads: int = 1
    """threads of the engine"""

    @property
    def seeds(self) -> range:
        first = EVALUATION.start if self.seed is None else self.seed
        return range(first, first + self.episodes)


class ControlSession:
    """Everything is closed with ``stack``. Raises UserError for options that do not fit."""

    def __init__(
        self, options: SessionConfig, artifact: Artifact, limits: profile.RobotProfile, stack: ExitStack
    ) -> None:
        self.options, self.spec = options, artifact.manifest.policy
        self.supervisor = Supervisor.of()
        self.periods = profile.periods(limits)
        self.failures: list[str] = []
        """what failed in the robot or the loop, in words"""
        opened = self._open_robot(options, self.spec)
        self.driver = Driver(opened)
        self.watchdog = Watchdog(self.driver)
        stack.callback(self._close)
        self.simulator = opened if isinstance(opened, SimulatorRobot) else None
        self.replay = opened if isinstance(opened, replay.ReplayRobot) else None
        paced = self.simulator or self.replay
        own = paced.hz if paced else None
        if options.hz is None and own is None:
            raise UserError("expected --hz with a robot's driver, found none; give the rate of its commands")
        hz = options.hz if options.hz is not None else float(own or 0)
        late = (SIMULATED_LATE if own else LoopTiming.late) if options.late is None else options.late
        self.timing = LoopTiming(hz, hz / own if own else 1.0, late, options.patience)
        state = self.spec.state
        names, units = ((), ()) if state is None else (state.names, state.units)
        if self.replay:
            limits = replay.untracked(limits)
        self.guard = Guard(limits, own or hz, self.spec.action, names, units, self.timing.gap, self.replay is None)
        strategy = options.strategy or ("replace" if self.replay else "synchronous")
        self.chunks = Chunks(strategy, self.spec.action.horizon, options.execute, self.periods)
        if self.simulator:
            self.simulator.reset(options.seeds[0])
        self.inference = InferenceProcess(
            LocalPolicy.load, (options.path, options.threads, True, options.backend), _first(self.driver)
        )
        stack.callback(self.inference.close)
        self.recorder = Recorder(self.driver, self.spec, hz, options.record) if options.record else None
        self.robot: Robot = self.recorder or self.driver
        self.instructed: Instructed | None = None
        if self.spec.prompt is not None:
            self.robot = self.instructed = Instructed(self.robot, self.recorder.begin if self.recorder else _nobody)
        self.standstill: RearmController | None = None  # with --rearm
        self.show: Show | None = None  # with --port
        self.board = stack.enter_context(Board.monitor())
        self.telemetry = telemetry.Telemetry(REMEMBERED, self.spec.action.dim)
        self.played: list[dict[str, Any]] = []

    @property
    def beside(self) -> list[int]:
        """The processes that the loop waits for in the end."""
        return [self.inference.pid] + ([self.simulator.pid] if self.simulator else [])

    def episode(self, seed: int, switch: StopSwitch) -> None:
        """Of a simulator or a recording until it is over, of a robot until it is stopped."""
        robot = self.simulator
        realtime.collect_garbage()
        self.inference.reset()
        if robot is not None:
            robot.reset(seed)
        with self.watchdog.watching(self.timing.gap * self.timing.period):
            self._controlled(switch)
        if robot is not None:
            self.played.append({"seed": seed, "success": robot.success, "steps": robot.steps})

    def _controlled(self, switch: StopSwitch) -> None:
        sensed = self.robot.sense()
        if self.recorder is not None:
            words = (sensed.observation.get("instruction") if sensed else None) or self.options.instruction
            self.recorder.begin(words or "run")
        control = ControlLoop(
            self.robot,
            self.inference,
            self.guard,
            self.chunks,
            self.spec,
            self.timing,
            self.telemetry,
            switch.asked,
            sleep=switch.wait,
            standstill=self.standstill,
            show=self.show,
            beat=lambda: self._beat(switch),
        )
        try:
            control.run(self._over, self.options.steps, rest=self.simulator is None and self.replay is None)
        finally:
            self.failures += control.failures

    def _beat(self, switch: StopSwitch) -> None:
        self.watchdog.beat()
        self.supervisor.beat()
        switch.keep()

    def _close(self) -> None:
        """A driver that cannot be closed does not cost the log."""
        try:
            with self.watchdog.closing():
                self.driver.close()
        except BaseException as error:
            self.failures.append(f"closing the robot failed: {said(error)}")

    def _over(self) -> bool:
        robot = self.simulator
        if robot is not None:
            return robot.over or robot.steps >= robot.horizon
        return self.replay is not None and self.replay.over

    @staticmethod
    def _open_robot(options: SessionConfig, spec: PolicySpec) -> Any:
        if options.env is not None:
            return SimulatorRobot(options.env, spec, options.env_mapping)
        if options.replay is not None:
            return replay.ReplayRobot(options.replay, options.episode, spec, options.cameras)
        module, _, function = str(options.driver).partition(":")
        sys.path.insert(0, "")  # a driver may lie where the command is given
        try:
            open_robot = getattr(importlib.import_module(module), function)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # whatever a module does when it is imported
            raise UserError(
                f"expected a driver MODULE:FUNCTION, found {options.driver}: {named(error)}; see docs/robots.md"
            ) from None
        try:
            return open_robot(spec, options.instruction)
        except (UserError, RobotError, KeyboardInterrupt):
            raise
        except BaseException as error:
            raise UserError(
                f"expected the driver {options.driver} to open, found: {named(error)}; correct it (docs/robots.md)"
            ) from None


def _nobody(words: str) -> None:
    """Nobody writes down what the robot was told."""


def _first(robot: Robot) -> Any:
    sensed = robot.sense()
    if sensed is None:
        raise UserError("expected a first state from the robot's driver, found none; let it wait for one when it opens")
    return sensed.observation
