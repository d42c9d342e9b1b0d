"""`rlrc run`: control a robot, a simulator or a recording. The field docstrings are the help."""

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
from rlrc.runtime.control import episodes, telemetry
from rlrc.runtime.control.control_loop import LoopTiming, describe_failure
from rlrc.runtime.control.session import ControlSession, SessionConfig
from rlrc.runtime.control.stop_switch import ASKED, StopSource, StopSwitch, ignore_first_interrupt
from rlrc.runtime.control.watchdog import finish_process
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
    """Control a robot, a simulator or a recording at a fixed rate: observe, infer in parallel, guard, act.

    Any key, Ctrl-C, --button and --port stop the robot; so does every failure (docs/robots.md).
    """

    path: Positional[Path]
    """the artifact"""
    profile: str | None = None
    """the robot's limits: a TOML file, or the name of a shipped profile (default: metaworld's in its simulator)"""
    log: Path | None = None
    """write the times and guard actions of every step: JSON lines, or .parquet"""
    button: Path | None = None
    """FIFO, device or socket of a stop button: any byte stops, and so does its end"""
    port: int | None = None
    """port of the operator's page, which can stop the robot; 0: any free port"""
    stop_port: int | None = None
    """port for stops only (POST /stop), which a busy page does not delay (default: any free port)"""
    host: str = "127.0.0.1"
    """address of the page; one that other machines can reach needs --certificate and --key, or --insecure"""
    token: str | None = None
    """the page's access token (or RLRC_TOKEN in the environment; default: a random one, which is printed)"""
    certificate: Path | None = None
    """PEM file with the page's certificate, for TLS"""
    key: Path | None = None
    """PEM file with its key"""
    insecure: bool = False
    """permit a page for other machines without TLS: an eavesdropper can stop the robot, and re-arm it"""
    pin: tuple[int, ...] = ()
    """processors for the loop (default: any)"""
    json: bool = False
    """print the summary and every episode as JSON instead"""

    def run(self) -> int:
        if self.episodes < 1:
            raise UserError(f"expected at least one episode, found {self.episodes}; give --episodes 1 or more")
        if self.seed is not None and self.seed < 0:
            raise UserError(f"expected a seed of 0 or more, found {self.seed}; give another --seed")
        if self.steps is not None and self.steps < 1:
            raise UserError(f"expected at least one step, found {self.steps}; give --steps 1 or more")
        given = [name for name in ("env", "driver", "replay") if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(f"--{name}" for name in given) or "none"
            raise UserError(
                f"expected one of --env, --driver and --replay, found {found}; name a simulator, a robot or a data set"
            )
        if self.replay is not None and self.strategy == "synchronous":
            raise UserError(
                "expected a strategy that does not wait, since a recording does not, found synchronous; give replace"
            )
        for out in (self.record, self.log):
            if out is not None:
                check_output(out)
        self._check_packages()
        if self.port is not None:
            self._access()
        elif self.stop_port is not None:
            raise UserError("expected --port with --stop-port, found none; give --port 0 for a page on any free port")
        if self.hz == 0:
            return self._run_in_lockstep()
        # Check the timing before a driver or a simulator, which takes seconds to open.
        LoopTiming(self.hz or 1.0, late=LoopTiming.late if self.late is None else self.late, patience=self.patience)
        return self._run_at_rate()

    def _check_packages(self) -> None:
        """Imports now what is needed only after the run, so that a missing package shows before it."""
        if self.record is not None:
            importlib.import_module("rlrc.datasets.writer")
        if self.log is not None and self.log.suffix == ".parquet":
            importlib.import_module("pyarrow.parquet")
        if self.port is not None:
            importlib.import_module("aiohttp")

    # As fast as possible, without a guard: a simulator only

    def _run_in_lockstep(self) -> int:
        if self.env is None or self.record or self.log or self.port is not None or self.rearm:
            raise UserError(
                "expected --env without --record, --log, --port and --rearm at --hz 0, found other options; give a rate"
            )
        policy = LocalPolicy.load(self.path, self.threads, backend=self.backend)
        from rlrc.envs.environment import open_environment

        env = open_environment(self.env, policy.spec, self.env_mapping)
        console, played = plain_console(stderr=self.json), []
        try:
            for episode in episodes.play_episodes(policy, env, self.seeds, episodes.Rate(0), self.execute):
                played.append(episode)
                console.print(_line(episode.seed, episode.success, episode.steps))
        except NoAction as error:
            return fail_check(str(error))
        finally:
            env.close()
        totals = episodes.summary(played)
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

    def _run_at_rate(self) -> int:
        artifact = artifacts.load(self.path, verify=())  # the process that infers checks the graphs
        if self.env is not None:
            from rlrc.envs.environment import check_environment

            check_environment(self.env, artifact.manifest.policy, self.env_mapping)
        limits, threads = profile.load(self._profile_name()), set(threading.enumerate())
        with ExitStack() as after:
            try:
                session, granted = self._play(artifact, limits, after)
            except (RobotError, WorkerDied) as error:  # before or between episodes; during one the loop stops the robot
                raise UserError(f"expected a robot that answers, found: {error}; check it and its driver") from None
            return finish_process(threads, self._report(session, granted))

    def _play(
        self, artifact: Artifact, limits: RobotProfile, after: ExitStack
    ) -> tuple[ControlSession, dict[str, str]]:
        """All episodes. -> the session, closed, with what it recorded; and what Linux granted.

        Until ``after`` ends, Ctrl-C does not interrupt the writing of log and recording.
        """
        console, switch, granted = plain_console(stderr=self.json), StopSwitch(), dict[str, str]()

        def report_hang(session: ControlSession, reason: str) -> None:
            self._report_hang(session, granted, reason)

        with ExitStack() as stack:
            session = ControlSession(
                self, artifact, limits, stack, switch, report_hang, lambda line: console.print(line, soft_wrap=True)
            )
            page = self._open_page(artifact, limits, session, stack)
            show, sources = None, list[StopSource]()
            if page is not None:
                shown = ControlPage(page, session.guard, switch, session.rearming, session.instruction_override)
                show, sources = shown.show, [shown.source, switch.source_of(page.stop)]
            handle_keys = None if session.rearming is None else session.rearming.handle_keys
            after.enter_context(ignore_first_interrupt())
            stack.enter_context(switch.listen(button=self.button, handle_keys=handle_keys, sources=sources))
            console.print(f"inference: {session.inference.warmth}; stops: {', '.join(switch.sources)}", soft_wrap=True)
            if page is not None:
                console.print(f"page: {page.link}", soft_wrap=True)
                console.print(f"stop: POST {page.stop.url}", soft_wrap=True)
            granted |= stack.enter_context(real_time(self.pin, session.process_ids))
            session.supervisor.ready(f"running {self.path} at {session.timing.hz:g} Hz")
            for seed in self.seeds if session.simulator else range(1):
                try:
                    session.play_episode(seed, show)
                except BaseException as error:
                    if not session.telemetry.steps:
                        raise
                    # The robot has been braked; what was logged and recorded until now is not lost.
                    session.failures.append(describe_failure(error, "the loop"))
                    break
                if session.simulator:
                    last = session.played[-1]
                    console.print(_line(seed, last["success"], last["steps"]))
                if session.guard.stopped:
                    break
            reason = session.guard.reason
            session.supervisor.stopping("done" if reason is None else f"stopped: {reason}")
        return session, granted

    def _report_hang(self, session: ControlSession, granted: dict[str, str], reason: str) -> None:
        """Writes and reports what there is, in the watchdog's thread: the loop's thread does not go on."""
        session.switch.restore_terminal()
        session.failures.append(reason)
        if not session.guard.stopped:
            session.guard.stop(reason)
        try:
            self._report(session, granted)
        except Exception as error:
            print(f"rlrc: error: stopped: {reason}; {one_line(error)}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()

    def _open_page(
        self, artifact: Artifact, limits: RobotProfile, session: ControlSession, stack: ExitStack
    ) -> Page | None:
        if self.port is None:
            return None
        address = Address(self.host, self.port, self._access().token, self.certificate, self.key, self.stop_port or 0)
        can = {"stop"} | ({"rearm", "bench"} if self.rearm else set())
        can |= {"instruction"} if session.instruction_override else set()
        rate = f"{session.timing.hz:g} Hz, {session.planner.chunks.strategy}"
        facts = {"warmed up": str(session.inference.warmth), "rate": rate}
        metadata = page_metadata("run", artifact, limits, session.timing.period * 1e3, can, **facts)
        page = Page(metadata, [camera.name for camera in session.spec.cameras], address)
        stack.callback(page.close)
        return page

    def _access(self) -> Access:
        """Access to the page requires the token; a random one is made if none is given."""
        shown = token(self.token) or secrets.token_urlsafe(16)
        return access(self.host, shown, self.certificate, self.key, self.insecure)

    def _profile_name(self) -> str:
        if self.profile is not None:
            return self.profile
        if self.env is not None and self.env.startswith("metaworld:"):
            return "metaworld"
        raise UserError(
            f"expected --profile with the robot's limits, one of {', '.join(profile.list_shipped())} or a TOML file, "
            "found none; see docs/robots.md (a simulator can be played without one at --hz 0)"
        )

    def _report(self, session: ControlSession, granted: dict[str, str]) -> int:
        totals = telemetry.summary(session.telemetry, 1 / session.timing.hz)
        totals |= {"asked_hz": session.timing.hz, "granted": granted, "stop": session.guard.reason}
        totals |= {"guard": {f"{kind} {act}": n for (kind, act), n in sorted(session.guard.counts.items())}}
        if stamped := session.board.readings():
            totals["board"] = monitor.summarise(stamped)
        if session.simulator:
            totals |= {"episodes": len(session.played), "successes": sum(one["success"] for one in session.played)}
        if self.log is not None:
            telemetry.write(session.telemetry, session.spec.action.names, self.log, stamped)
        if self.record is not None and session.recorder is not None:
            totals["recorded_frames"] = session.recorder.finish()
        if session.replay is not None:
            totals["replay"] = cli_replay.errors(
                session.replay.recorded, session.telemetry, session.spec.action.names, session.periods
            )
        if self.json:
            print(json.dumps(totals | {"played": session.played}))
        else:
            compared = cli_replay.format_errors(totals["replay"], session.spec.action.units) if session.replay else {}
            print_rows(telemetry.format_rows(totals) | compared, plain_console())
        reason = session.guard.reason
        failures = [] if reason is None or reason.startswith(ASKED) else [f"stopped: {reason}"]
        failures += [one for one in dict.fromkeys(session.failures) if one not in str(reason)]
        if failures:
            return fail_check("; ".join(failures))
        if not self.json:
            plain_console().print(f"next: rlrc bench latency {self.path}")
        return 0


def _line(seed: int, success: bool, steps: int) -> Text:
    return Text(
        f"seed {seed}: {'success' if success else 'failure'} after {steps} steps", "green" if success else "red"
    )
