"""The command that closes the loop: `rlrc run`. The field docstrings are the help."""

from __future__ import annotations

import importlib
import json
import secrets
import sys
import threading
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.text import Text
from tyro.conf import Positional

from rlrc import artifact as artifacts
from rlrc.artifact import Artifact
from rlrc.errors import UserError
from rlrc.folders import check_output
from rlrc.realtime import real_time
from rlrc.robots.driver import one_line
from rlrc.robots.robot import RobotError
from rlrc.runtime.board import monitor
from rlrc.runtime.cli import replay as cli_replay
from rlrc.runtime.cli.policy import fail_check
from rlrc.runtime.control import episodes as loop
from rlrc.runtime.control import telemetry
from rlrc.runtime.control.control_loop import LoopTiming, why
from rlrc.runtime.control.rearming import RearmController
from rlrc.runtime.control.session import ControlSession, SessionConfig
from rlrc.runtime.control.stop_switch import ASKED, StopSwitch, uninterrupted
from rlrc.runtime.control.watchdog import leave
from rlrc.runtime.inference.decode import NoAction
from rlrc.runtime.inference.policy import LocalPolicy
from rlrc.runtime.page.control_page import ControlPage
from rlrc.runtime.page.feed import Address
from rlrc.runtime.page.metadata import page_metadata
from rlrc.runtime.page.process import Page
from rlrc.runtime.safety import profile
from rlrc.runtime.safety.profile import RobotProfile
from rlrc.runtime.wire.ports import Access, access, token
from rlrc.tables import plain_console, print_rows
from rlrc.worker import WorkerDied


@dataclass(frozen=True)
class RunPolicy(SessionConfig):
    """Close the loop at a fixed rate on a robot or a simulator: observe, infer beside the loop, guard, act.

    Any key, Ctrl-C or what --button and --port bring stops the robot; so does whatever goes wrong (docs/robots.md).
    """

    path: Positional[Path]
    """the artifact"""
    profile: str | None = None
    """the robot's limits: a TOML file, or the name of one of ours (default: that of metaworld)"""
    log: Path | None = None
    """write every step's times and what the guard did: JSON lines, or .parquet"""
    button: Path | None = None
    """FIFO, device or socket of a stop button: any byte stops, and its end"""
    port: int | None = None
    """port of the operator's page, which stops too; 0 is any free one"""
    stop_port: int | None = None
    """port that stops without the page (POST /stop), whatever keeps the page's busy (default: any free one)"""
    host: str = "127.0.0.1"
    """address of the page; one that other machines reach needs --certificate and --key, or --insecure"""
    token: str | None = None
    """what the page wants to be shown (or RLRC_TOKEN in the environment; default: one that is drawn and printed)"""
    certificate: Path | None = None
    """PEM file with the page's certificate, for TLS"""
    key: Path | None = None
    """PEM file with its key"""
    insecure: bool = False
    """a page for other machines without TLS: whoever listens in can stop the robot, and re-arm it"""
    rearm: bool = False
    """hold the robot after a stop, until somebody re-arms it (R, or the page) or ends the run (q, Ctrl-C)"""
    pin: tuple[int, ...] = ()
    """processors that the loop is to run on (default: any)"""
    json: bool = False
    """print the summary and every episode as JSON instead"""

    def run(self) -> int:
        if self.episodes < 1:
            raise UserError(f"expected at least one episode, found {self.episodes}; give --episodes 1 or more")
        if self.seed is not None and self.seed < 0:
            raise UserError(f"expected a seed of 0 or more, found {self.seed}; give another --seed")
        if self.steps is not None and self.steps < 1:
            raise UserError(f"expected at least one step, found {self.steps}; give --steps 1 or more")
        named = [name for name in ("env", "driver", "replay") if getattr(self, name) is not None]
        if len(named) != 1:
            found = " and ".join(f"--{name}" for name in named) or "none"
            raise UserError(
                f"expected one of --env, --driver and --replay, found {found}; name a simulator, a robot or a data set"
            )
        if self.replay is not None and self.strategy == "synchronous":
            raise UserError(
                "expected a strategy that does not wait, as no recording does, found synchronous; give replace"
            )
        for out in (self.record, self.log):
            if out is not None:
                check_output(out)
        self._check_packages()
        if self.port is not None:
            self._access()
        elif self.stop_port is not None:
            raise UserError("expected --port with --stop-port, found none; give --port 0 for a page on any free one")
        if self.hz == 0:
            return self._in_lockstep()
        # Refused now: a robot's driver or a simulator takes seconds to open.
        LoopTiming(self.hz or 1.0, late=LoopTiming.late if self.late is None else self.late, patience=self.patience)
        return self._in_time()

    def _check_packages(self) -> None:
        """What is only needed when the run is over had better be here before it begins."""
        if self.record is not None:
            importlib.import_module("rlrc.datasets.writer")
        if self.log is not None and self.log.suffix == ".parquet":
            importlib.import_module("pyarrow.parquet")
        if self.port is not None:
            importlib.import_module("aiohttp")

    # As fast as possible, without a guard: a simulator only

    def _in_lockstep(self) -> int:
        if self.env is None or self.record or self.log or self.port is not None or self.rearm:
            raise UserError(
                "expected --env without --record, --log, --port and --rearm at --hz 0, found it otherwise; give a rate"
            )
        policy = LocalPolicy.load(self.path, self.threads, backend=self.backend)
        from rlrc.envs.environment import open_environment

        env = open_environment(self.env, policy.spec, self.env_mapping)
        console, played = plain_console(stderr=self.json), []
        try:
            for episode in loop.episodes(policy, env, self.seeds, loop.Rate(0), self.execute):
                played.append(episode)
                console.print(_line(episode.seed, episode.success, episode.steps))
        except NoAction as error:
            return fail_check(str(error))
        finally:
            env.close()
        totals = loop.summary(played)
        if self.json:
            print(json.dumps(totals | {"played": [asdict(episode) for episode in played]}))
            return 0
        console.print(
            f"{totals['successes']} of {totals['episodes']} episodes succeeded; {totals['steps']} steps; inference "
            f"p50 {totals['inference_ms_p50']:.2f} ms, p99 {totals['inference_ms_p99']:.2f} ms, "
            f"max {totals['inference_ms_max']:.2f} ms"
        )
        console.print(f"next: rlrc bench latency {self.path}")
        return 0

    # At a fixed rate

    def _in_time(self) -> int:
        artifact = artifacts.load(self.path, verify=())  # the process that infers checks the graphs
        if self.env is not None:
            from rlrc.envs.environment import check_environment

            check_environment(self.env, artifact.manifest.policy, self.env_mapping)
        limits, threads = profile.load(self._profile_name()), set(threading.enumerate())
        with ExitStack() as after:
            try:
                run, granted = self._play(artifact, limits, after)
            except (RobotError, WorkerDied) as error:  # before or between episodes; the loop makes a stop of them
                raise UserError(f"expected a robot that answers, found: {error}; check it and its driver") from None
            return leave(threads, self._report(run, granted))

    def _play(
        self, artifact: Artifact, limits: RobotProfile, after: ExitStack
    ) -> tuple[ControlSession, dict[str, str]]:
        """All episodes. What was run is closed, and still tells what it was like; what Linux granted.

        Until ``after`` ends, Ctrl-C does not interrupt what is put away.
        """
        with ExitStack() as stack:
            run = ControlSession(self, artifact, limits, stack)
            console, switch, granted = plain_console(stderr=self.json), StopSwitch(), dict[str, str]()
            run.watchdog.put_away = lambda reason: self._put_away(run, switch, granted, reason)
            if self.rearm:
                run.standstill = RearmController(switch, lambda line: console.print(line, soft_wrap=True))
            page = self._page(artifact, limits, run, stack)
            shown = [] if page is None else [ControlPage(page, run.guard, switch, run.standstill, run.instructed)]
            run.show = shown[0].show if shown else None
            typed = None if run.standstill is None else run.standstill.typed
            others = [] if page is None else [*(one.source for one in shown), switch.over(page.stop)]
            after.enter_context(uninterrupted())
            stack.enter_context(switch.listen(button=self.button, typed=typed, others=others))
            console.print(f"inference: {run.inference.warmth}; stops: {', '.join(switch.sources)}", soft_wrap=True)
            if page is not None:
                console.print(f"page: {page.link}", soft_wrap=True)
                console.print(f"stop: POST {page.stop.url}", soft_wrap=True)
            granted |= stack.enter_context(real_time(self.pin, run.beside))
            run.supervisor.ready(f"running {self.path} at {run.timing.hz:g} Hz")
            for seed in self.seeds if run.simulator else range(1):
                try:
                    run.episode(seed, switch)
                except BaseException as error:
                    if not run.telemetry.steps:
                        raise
                    # The robot has been braked; what was logged and recorded until now is not lost.
                    run.failures.append(why(error, "the loop"))
                    break
                if run.simulator:
                    last = run.played[-1]
                    console.print(_line(seed, last["success"], last["steps"]))
                if run.guard.stopped:
                    break
            run.supervisor.stopping(f"stopped: {run.guard.reason}" if run.guard.stopped else "done")
        return run, granted

    def _put_away(self, run: ControlSession, switch: StopSwitch, granted: dict[str, str], reason: str) -> None:
        """Writes and reports what there is, in the watchdog's thread, where the loop's does not go on."""
        switch.put_back()
        run.failures.append(reason)
        if not run.guard.stopped:
            run.guard.stop(reason)
        try:
            self._report(run, granted)
        except Exception as error:
            print(f"rlrc: error: stopped: {reason}; {one_line(error)}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()

    def _page(self, artifact: Artifact, limits: RobotProfile, run: ControlSession, stack: ExitStack) -> Page | None:
        if self.port is None:
            return None
        address = Address(self.host, self.port, self._access().token, self.certificate, self.key, self.stop_port or 0)
        can = {"stop"} | ({"rearm", "bench"} if self.rearm else set()) | ({"instruction"} if run.instructed else set())
        facts = {"warmed up": str(run.inference.warmth), "rate": f"{run.timing.hz:g} Hz, {run.chunks.strategy}"}
        told = page_metadata("run", artifact, limits, run.timing.period * 1e3, can, **facts)
        page = Page(told, [camera.name for camera in run.spec.cameras], address)
        stack.callback(page.close)
        return page

    def _access(self) -> Access:
        """Who may see the page: whoever shows the token, which is drawn if there is none."""
        shown = token(self.token) or secrets.token_urlsafe(16)
        return access(self.host, shown, self.certificate, self.key, self.insecure)

    def _profile_name(self) -> str:
        if self.profile is not None:
            return self.profile
        if self.env is not None and self.env.startswith("metaworld:"):
            return "metaworld"
        raise UserError(
            f"expected --profile with the robot's limits, one of {', '.join(profile.shipped())} or a TOML file, found "
            "none; see docs/robots.md (a simulator can be played without one at --hz 0)"
        )

    def _report(self, run: ControlSession, granted: dict[str, str]) -> int:
        totals = telemetry.summary(run.telemetry, 1 / run.timing.hz)
        totals |= {"asked_hz": run.timing.hz, "granted": granted, "stop": run.guard.reason}
        totals |= {"guard": {f"{kind} {act}": n for (kind, act), n in sorted(run.guard.counts.items())}}
        if stamped := run.board.readings():
            totals["board"] = monitor.summarise(stamped)
        if run.simulator:
            totals |= {"episodes": len(run.played), "successes": sum(one["success"] for one in run.played)}
        if self.log is not None:
            telemetry.write(run.telemetry, run.spec.action.names, self.log, stamped)
        if self.record is not None and run.recorder is not None:
            totals["recorded_frames"] = run.recorder.finish()
        if run.replay is not None:
            totals["replay"] = cli_replay.errors(run.replay.recorded, run.telemetry, run.spec.action.names, run.periods)
        if self.json:
            print(json.dumps(totals | {"played": run.played}))
        else:
            compared = cli_replay.format_errors(totals["replay"], run.spec.action.units) if run.replay else {}
            print_rows(telemetry.told(totals) | compared, plain_console())
        reason = run.guard.reason
        failures = [] if reason is None or reason.startswith(ASKED) else [f"stopped: {reason}"]
        failures += [one for one in dict.fromkeys(run.failures) if one not in str(reason)]
        if failures:
            return fail_check("; ".join(failures))
        if not self.json:
            plain_console().print(f"next: rlrc bench latency {self.path}")
        return 0


def _line(seed: int, success: bool, steps: int) -> Text:
    return Text(
        f"seed {seed}: {'success' if success else 'failure'} after {steps} steps", "green" if success else "red"
    )
