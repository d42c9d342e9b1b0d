"""The control loop in long runs under load, with slow inference, without a model, and under faults.

The rows of all scenarios have the same figures: steps, late actions, held steps, jitter of the commands and of a bare
timer in parallel, growth of memory, and time from a fault to the first hold.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlrc import artifact as artifacts
from rlrc.artifact import PolicySpec
from rlrc.benchmarks.control import faults, simulated_arm
from rlrc.benchmarks.control.background_load import background_load, timer, viewer
from rlrc.benchmarks.measure.memory import read_process
from rlrc.benchmarks.results.stats import mcnemar, wilson
from rlrc.envs.seeds import EVALUATION
from rlrc.errors import UserError
from rlrc.realtime import collect_garbage, real_time
from rlrc.robots.simulator import SimulatorRobot
from rlrc.runtime.control.chunks import STRATEGIES, Chunks, Strategy
from rlrc.runtime.control.control_loop import ControlLoop, LoopHooks, LoopTiming
from rlrc.runtime.control.inference_process import InferenceProcess
from rlrc.runtime.control.planner import Planner
from rlrc.runtime.control.step import Show
from rlrc.runtime.control.stop_switch import StopSwitch
from rlrc.runtime.control.telemetry import PARTS, Telemetry, jitter, summary
from rlrc.runtime.inference import preprocess
from rlrc.runtime.inference.policy import LocalPolicy
from rlrc.runtime.page.control_page import ControlPage
from rlrc.runtime.page.feed import Address
from rlrc.runtime.page.metadata import list_plots
from rlrc.runtime.page.process import Page
from rlrc.runtime.safety import profile
from rlrc.runtime.safety.guard import Guard

HZ = 50.0
LATE = 10.0  # periods, the maximum age of a state: the simulator shares the machine
SETTLED_S = 30.0  # growth of memory is measured from this time on
Tick = Callable[[int], None]


class SlowInference:
    """A policy whose inference takes at least ``seconds``."""

    def __init__(self, path: Path, seconds: float) -> None:
        self._policy, self._seconds = LocalPolicy.load(path), seconds

    def reset(self) -> None:
        self._policy.reset()

    def infer(self, observation: Mapping[str, Any], continuation: Any = None) -> Any:
        begun = time.monotonic()
        result = self._policy.infer(observation, continuation)
        time.sleep(max(0.0, self._seconds - (time.monotonic() - begun)))
        return result


class SimulatedPolicy:
    """A policy on the simulator at a fixed rate, episode after episode."""

    def __init__(self, path: Path, task: str, hz: float, strategy: Strategy, seconds: float, capacity: int) -> None:
        self.spec = artifacts.load(path, verify=()).manifest.policy
        self.robot = SimulatorRobot(f"metaworld:{task}", self.spec)
        self.robot.reset(EVALUATION[0])
        sensed = self.robot.sense()
        assert sensed is not None
        self.inference = InferenceProcess(SlowInference, (path, seconds), sensed.observation)
        self.timing = LoopTiming(hz, hz / self.robot.hz, LATE, patience=5.0)
        self.strategy = strategy
        self.telemetry = Telemetry(capacity, self.spec.action.dim)
        self.guard = self._new_guard()

    def _new_guard(self) -> Guard:
        state = self.spec.state
        names, units = ((), ()) if state is None else (state.names, state.units)
        return Guard(profile.load("metaworld"), self.robot.hz, self.spec.action, names, units, self.timing.gap)

    def episode(self, seed: int) -> tuple[bool, str | None]:
        collect_garbage()
        self.inference.reset()
        self.robot.reset(seed)
        if self.guard.stopped:
            self.guard = self._new_guard()
        planner = Planner(self.inference, Chunks(self.strategy, self.spec.action.horizon), self.spec)
        control_loop = ControlLoop(self.robot, planner, self.guard, self.telemetry, self.spec, self.timing)
        control_loop.run(lambda: self.robot.over or self.robot.steps >= self.robot.horizon)
        return self.robot.success, self.guard.reason

    @property
    def processes(self) -> tuple[int, int]:
        return self.inference.pid, self.robot.pid

    def close(self) -> None:
        self.inference.close()
        self.robot.close()


def steady(path: Path, minutes: float, tick: Tick, task: str = "drawer-open-v3") -> dict[str, Any]:
    """The reference policy in a long run, with another process loading one processor."""
    run = SimulatedPolicy(path, task, HZ, "continue", 0.0, int(minutes * 60 * HZ * 1.1) + 1000)
    ended, settled, growth = list[bool](), 0, 0
    try:
        with background_load(), timer(HZ) as timed, real_time(background=run.processes) as granted:
            begun = time.monotonic()
            while (passed := time.monotonic() - begun) < minutes * 60:
                success, reason = run.episode(EVALUATION[len(ended)])
                ended.append(success)
                if reason is not None:
                    raise UserError(f"expected the loop to run for {minutes:g} min, found it stopped: {reason}")
                resident = read_process()["anonymous"]
                settled = resident if passed < SETTLED_S else settled
                growth = max(growth, resident - settled)
                tick(1)
    finally:
        run.close()
    timer_ms = jitter(np.diff(timed()), 1 / HZ)
    return figures("steady", run.telemetry, HZ, timer_ms, growth) | {
        "stalls": stalls(run.telemetry.rows, timed()),
        "episodes": len(ended),
        "success": float(np.mean(ended)),
        "granted": granted,
    }


def stalls(rows: NDArray[Any], woken: NDArray[np.float64]) -> list[dict[str, Any]]:
    """Steps that ended after the next one was due: the times of their parts, whether they held, and how late the bare
    timer woke up meanwhile, in ms."""
    stalled = []
    for row in rows[rows["sent"] - rows["due"] >= 1 / HZ]:
        due, sent = float(row["due"]), float(row["sent"])
        # Gaps between the timer's wake-ups that overlap the step.
        gaps = np.diff(woken)[(woken[1:] > due) & (woken[:-1] < sent)]
        times = {name: round(float(row[name]), 2) for name in ("late_ms", *(f"{part}_ms" for part in PARTS))}
        stalled.append(
            times | {"held": bool(row["held"]), "timer_ms": round(float(gaps.max(initial=0) - 1 / HZ) * 1e3, 2)}
        )
    return stalled


def slow(path: Path, periods: float, episodes: int, tasks: tuple[str, ...], tick: Tick) -> Iterator[dict[str, Any]]:
    """Success and jumps between chunks with inference of ``periods`` periods, for every strategy, against no delay."""
    baseline: list[bool] = []
    for strategy, delay in (("synchronous", 0.0), *((strategy, periods) for strategy in STRATEGIES)):
        ended, jumps, stopped = list[bool](), list[NDArray[Any]](), list[str]()
        telemetries: list[Telemetry] = []
        for task in tasks:
            run = SimulatedPolicy(path, task, HZ, strategy, delay / HZ, 500 * episodes)
            try:
                with real_time(background=run.processes):
                    for seed in EVALUATION[:episodes]:
                        success, reason = run.episode(seed)
                        ended.append(success)
                        stopped += [reason] if reason else []
                        tick(1)
            finally:
                run.close()
            telemetries.append(run.telemetry)
            jumps.append(splice_jumps(run.telemetry))
        baseline = baseline or ended
        jumped = np.concatenate(jumps)
        pairs = list(zip(ended, baseline, strict=True))
        only, only0 = pairs.count((True, False)), pairs.count((False, True))
        merged = figures(f"{strategy}, {delay:g} periods", join_telemetry(telemetries), HZ, None, 0)
        yield merged | {
            "strategy": strategy,
            "delay_periods": delay,
            "episodes": len(ended),
            "success": float(np.mean(ended)),
            "interval": list(wilson(sum(ended), len(ended))),
            "mcnemar_p": mcnemar(only, only0),
            "stopped": stopped,
            "splice_jump": {
                "p50": float(np.median(jumped)),
                "p99": float(np.percentile(jumped, 99)),
                "max": float(jumped.max()),
                "all": [round(float(jump), 4) for jump in jumped],
            },
        }


def splice_jumps(telemetry: Telemetry) -> NDArray[np.float64]:
    """The largest change of a command dimension, without the gripper, at each start of a new chunk."""
    rows, commands = telemetry.rows, telemetry.commands.astype(float)
    changed = (rows["chunk"][1:] != rows["chunk"][:-1]) & (rows["step"][1:] > rows["step"][:-1])
    return np.asarray(np.abs(np.diff(commands[:, :-1], axis=0)).max(1)[changed], np.float64)


def join_telemetry(parts: list[Telemetry]) -> Telemetry:
    """Concatenate the steps."""
    whole = Telemetry(sum(len(one.rows) for one in parts), parts[0].commands.shape[1])
    at = 0
    for one in parts:
        whole._rows[at : at + len(one.rows)], whole._commands[at : at + len(one.rows)] = one.rows, one.commands
        at += len(one.rows)
    whole.steps = at
    return whole


def overhead(seconds: float, tick: Tick, page: bool = False) -> Iterator[dict[str, Any]]:
    """The loop with the simulated arm, without a model: one 96 px camera; two of 640 x 480 px scaled to 224 px.

    Includes preprocessing, and with ``page`` the operator's page and a viewer.
    """
    kind = "page" if page else "overhead"
    for name, size, cameras in ((f"{kind}, 96 px", (96, 96), 1), (f"{kind}, 2 x 640 x 480", (480, 640), 2)):
        names = ("wrist", "front")[:cameras]
        spec = simulated_arm.spec(size, names, 96 if cameras == 1 else 224)
        arm = simulated_arm.SimulatedArm(size, names)
        sensed = arm.sense()
        assert sensed is not None
        inference = InferenceProcess(PreprocessingCircle, (spec,), sensed.observation)
        guard = Guard(simulated_arm.profile(), HZ, spec.action, simulated_arm.JOINTS, spec.action.units)
        telemetry = Telemetry(int(seconds * HZ) + 10, spec.action.dim)
        planner = Planner(inference, Chunks("replace", simulated_arm.HORIZON), spec)
        try:
            with open_page(guard, spec, names) if page else nullcontext() as show:
                control_loop = ControlLoop(arm, planner, guard, telemetry, spec, LoopTiming(HZ), LoopHooks(show=show))
                with real_time(background=(inference.pid,)):
                    control_loop.run(steps=int(seconds * HZ))
        finally:
            inference.close()
        tick(1)
        prepared = preparation(spec, sensed.observation)
        row = figures(name, telemetry, HZ, None, 0)
        yield row | {
            "loop_ms_p99": row["overhead_ms"]["p99"],
            "preprocess_ms_p99": float(np.percentile(prepared, 99)),
            "stop": guard.reason,
        }


@contextmanager
def open_page(guard: Guard, spec: PolicySpec, cameras: tuple[str, ...]) -> Iterator[Show]:
    """Open the operator's page of a loop, with a viewer."""
    metadata = {"kind": "run", "name": "rig", "facts": [], "rows": list_plots(spec, guard.profile), "cameras": cameras}
    page = Page(metadata, cameras, Address())
    try:
        show = ControlPage(page, guard, StopSwitch(), None, None).show
        with viewer(page.link, len(cameras)):
            yield show
    finally:
        page.close()


class PreprocessingCircle(simulated_arm.Circle):
    """The simulated arm's policy, with the preprocessing of a real one."""

    def __init__(self, spec: Any) -> None:
        super().__init__(HZ)
        self._spec = spec

    def infer(self, observation: Mapping[str, Any], continuation: Any = None) -> dict[str, Any]:
        preprocess.check(observation, self._spec)
        preprocess.prepare(observation, self._spec, None)
        return super().infer(observation, continuation)


def preparation(spec: Any, observation: Mapping[str, Any], calls: int = 300) -> list[float]:
    """Milliseconds of preprocessing an observation, by call."""
    spent = []
    for _ in range(calls):
        begun = time.perf_counter()
        preprocess.check(observation, spec)
        preprocess.prepare(observation, spec, None)
        spent.append((time.perf_counter() - begun) * 1e3)
    return spent


def fault_matrix(tick: Tick) -> Iterator[dict[str, Any]]:
    """The fault matrix."""
    for fault in faults.FAULTS:
        outcome = faults.inject(fault, HZ)
        tick(1)
        yield {
            "name": f"fault: {fault}",
            "hz": HZ,
            "seconds": None,
            "steps": None,
            "late_actions": None,
            "held_steps": None,
            "jitter_ms_p99": None,
            "timer_jitter_ms_p99": None,
            "rss_growth_bytes": None,
            "time_to_hold_ms": round(outcome.hold_ms, 3),
            "time_to_rest_ms": round(outcome.rest_ms, 3),
            "commands_after": outcome.after,
            "robot_stop": outcome.stopped,
            "reason": outcome.reason,
        }


def figures(name: str, telemetry: Telemetry, hz: float, timer_ms: float | None, growth: int) -> dict[str, Any]:
    totals = summary(telemetry, 1 / hz)
    return {
        "name": name,
        "hz": hz,
        "seconds": round(len(telemetry.rows) / hz, 2),
        "steps": totals["steps"],
        "late_actions": totals["late_actions"],
        "held_steps": totals["held_steps"],
        "skipped_steps": totals["skipped_steps"],
        "jitter_ms_p99": totals["jitter_ms_p99"],
        "timer_jitter_ms_p99": timer_ms,
        "rss_growth_bytes": growth,
        "time_to_hold_ms": None,
        "overhead_ms": totals["overhead_ms"],
        "inference_ms": totals["inference_ms"],
        "show_ms": totals["show_ms"],
    }
