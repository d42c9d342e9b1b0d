"""The command that serves a policy over the network: `rlrc serve`. The field docstrings are the help."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from rlrc import artifact as artifacts
from rlrc import realtime
from rlrc.artifact import Artifact, PolicySpec
from rlrc.errors import UserError
from rlrc.runtime.cli.policy import fail_check
from rlrc.runtime.control.service_manager import Supervisor
from rlrc.runtime.inference.backends import Backend
from rlrc.runtime.inference.policy import LocalPolicy
from rlrc.runtime.safety import profile
from rlrc.runtime.safety.guard import Guard
from rlrc.runtime.servers import observations
from rlrc.runtime.servers.guarded import GuardedChunks
from rlrc.runtime.servers.observations import Observations
from rlrc.runtime.servers.openpi import OpenpiServer
from rlrc.runtime.servers.session import WAITING, Session
from rlrc.runtime.wire import logs
from rlrc.runtime.wire.ports import Access, access, check_plain, token, url
from rlrc.tables import plain_console

DRAIN_S = 10.0
DEFAULT_MAPPINGS = {"openvla": "openvla"}  # of the others: the policy's own names
SCHEMES = {"openpi": "ws", "openvla": "http", "gr00t": "tcp", "lerobot": "grpc"}


@dataclass(frozen=True)
class Serve:
    """Serve a policy to clients of openpi, OpenVLA, GR00T or LeRobot as they are, until Ctrl-C (docs/serving.md)."""

    path: Positional[Path]
    """the artifact"""
    protocol: tuple[Literal["openpi", "openvla", "gr00t", "lerobot"], ...] = ("openpi",)
    """what to speak, each on a port of its own"""
    host: str = "127.0.0.1"
    """address to listen on; one that other machines reach needs --token, --certificate and --key, or --insecure"""
    port: tuple[int, ...] = (8000,)
    """ports in the order of the protocols; those left out count up from the last; 0 is any free one"""
    mapping: dict[str, str] = field(default_factory=dict)
    """pairs of a protocol and what its clients' keys mean: own (the policy's names), libero, droid, aloha, openvla,
    openvla-oft, gr00t-libero, gr00t-droid, gr00t-so100, or a TOML file (default: own; openvla for openvla)"""
    instruction: str | None = None
    """what to do where a client does not say"""
    profile: str | None = None
    """guard every action of every chunk with a robot's limits: a TOML file, or the name of one of ours; needs --hz"""
    hz: float | None = None
    """actions a second that the client executes, for the guard"""
    page: int | None = None
    """port of the operator's page: pictures, latency, guard, a stop, re-arming; 0 is any free one"""
    stop_port: int | None = None
    """port that stops without the page (POST /stop), whatever keeps other ports busy (default: any free one)"""
    log: Literal["text", "json"] = "text"
    """how to write the log on stderr: for people, or an object a line"""
    token: str | None = None
    """what clients have to show (or RLRC_TOKEN in the environment): Authorization: Api-Key TOKEN, or Bearer"""
    certificate: Path | None = None
    """PEM file with the certificate, for TLS"""
    key: Path | None = None
    """PEM file with its key"""
    insecure: bool = False
    """listen beyond this machine without a token or TLS: whoever reaches the port moves the robot"""
    waiting: int = WAITING
    """observations that may wait for the policy; more are refused"""
    backend: Backend | None = None
    """which of the artifact's graphs to run (default: the first there are of onnxruntime, tensorrt, gguf)"""
    threads: int = 1
    """threads of the engine"""

    def run(self) -> int:
        if self.waiting < 1:
            raise UserError(f"expected room for an observation, found --waiting {self.waiting}; give 1 or more")
        if not self.protocol or len(set(self.protocol)) != len(self.protocol):
            raise UserError(f"expected every protocol once, found {' '.join(self.protocol) or 'none'}; name it once")
        if self.stop_port is not None and self.page is None:
            raise UserError("expected --page with --stop-port, found none; give --page 0 for one on any free port")
        if strange := sorted(self.mapping.keys() - set(self.protocol)):
            raise UserError(f"expected mappings of {', '.join(self.protocol)}, found one of {strange[0]}; leave it out")
        allowed = access(self.host, token(self.token), self.certificate, self.key, self.insecure)
        check_plain(self.host, self.protocol, self.insecure)
        artifact = artifacts.load(self.path, verify=())  # the process that infers checks the graphs
        spec = artifact.manifest.policy
        guarded, ports = self._guarded(spec), self._ports()
        mapped: dict[str, Observations] = {
            name: observations.load(
                self.mapping.get(name, DEFAULT_MAPPINGS.get(name, observations.OWN)), spec, self.instruction, name
            )
            for name in self.protocol
        }
        realtime.return_large_blocks()
        logs.begin(self.log)
        logging.getLogger("rlrc.runtime.servers.openpi.frames").setLevel(logging.CRITICAL)  # every port scan is one
        failure = asyncio.run(self._serve(artifact, guarded, mapped, ports, allowed))
        return 0 if failure is None else fail_check(failure)

    async def _serve(
        self,
        artifact: Artifact,
        guarded: GuardedChunks | None,
        mapped: dict[str, Observations],
        ports: list[int],
        allowed: Access,
    ) -> str | None:
        """-> why it ended; None: somebody asked for it."""
        console, asked, supervisor = plain_console(), asyncio.Event(), Supervisor.of()
        session = Session(artifact.manifest.policy, guarded, self.waiting)
        kinds = {name: _server(name) for name in mapped}
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, asked.set)
        async with AsyncExitStack() as stack:
            stack.callback(session.close)
            for (name, mapping), port in zip(mapped.items(), ports, strict=True):
                server = kinds[name](session, mapping, allowed)
                found = await server.start(self.host, port)
                stack.push_async_callback(server.stop)
                scheme = SCHEMES[name] + ("s" if allowed.tls and name in ("openpi", "openvla") else "")
                console.print(f"{name}: {url(scheme, self.host, found)}  {'; '.join(mapping.told)}", soft_wrap=True)
            if self.page is not None:
                await self._open_page(artifact, session, stack)
            opening = asyncio.ensure_future(
                session.open(LocalPolicy.load, (self.path, self.threads, True, self.backend))
            )
            await _first(opening, asked.wait())
            if not asked.is_set():
                opening.result()
                console.print(f"ready: {session.warmth}", soft_wrap=True)
                supervisor.ready(f"serving {self.path}")
                await _first(asked.wait(), session.failed.wait(), _beating(supervisor))
            supervisor.stopping(session.failure or "asked to end")
            await session.drain(DRAIN_S)
        return session.failure

    async def _open_page(self, artifact: Artifact, session: Session, stack: AsyncExitStack) -> None:
        """In a process of its own; if that ends, the server goes on without."""
        from rlrc.runtime.page.feed import Address
        from rlrc.runtime.page.metadata import page_metadata
        from rlrc.runtime.page.process import Page
        from rlrc.runtime.page.server_page import SessionPage

        guard = None if session.guarded is None else session.guarded.guard
        chunk_ms = None if self.hz is None else session.spec.action.horizon / self.hz * 1e3  # that a chunk lasts
        can = {"stop", "rearm", "bench"} | (set() if session.spec.prompt is None else {"instruction"})
        facts = {"protocols": ", ".join(self.protocol)}
        told = page_metadata("serve", artifact, None if guard is None else guard.profile, chunk_ms, can, **facts)
        address = Address(self.host, self.page or 0, token(self.token), self.certificate, self.key, self.stop_port or 0)
        page = Page(told, [camera.name for camera in session.spec.cameras], address)
        stack.callback(page.close)
        telling = asyncio.ensure_future(SessionPage(page, session).run())
        stack.push_async_callback(_ended, telling)  # before the page is closed, whose socket it listens to
        plain_console().print(f"page: {page.link}", soft_wrap=True)
        plain_console().print(f"stop: POST {page.stop.url}", soft_wrap=True)

    def _guarded(self, spec: PolicySpec) -> GuardedChunks | None:
        if self.profile is None:
            return None
        if self.hz is None:
            raise UserError("expected --hz with --profile, found none; give the rate at which the client acts")
        names, units = ((), ()) if spec.state is None else (spec.state.names, spec.state.units)
        return GuardedChunks(Guard(profile.load(self.profile), self.hz, spec.action, names, units))

    def _ports(self) -> list[int]:
        ports = list(self.port)
        if not 0 < len(ports) <= len(self.protocol):
            raise UserError(f"expected a port for each of {', '.join(self.protocol)}, found {len(ports)}; give as many")
        while len(ports) < len(self.protocol):
            ports.append(ports[-1] + 1 if ports[-1] else 0)
        if not all(0 <= port < 2**16 for port in ports):
            raise UserError(f"expected ports of 0 to 65535, found {ports}; give others")
        return ports


def _server(name: str) -> Callable[..., Any]:
    """Only the module of a protocol that is spoken is imported: the extra "serve" brings what some need."""
    if name == "openpi":
        return OpenpiServer
    server: Callable[..., Any] = getattr(import_module(f"rlrc.runtime.servers.{name}"), f"{name.capitalize()}Server")
    return server


async def _beating(supervisor: Supervisor) -> None:
    """As long as the event loop turns. A policy that hangs is the session's matter."""
    while supervisor.seconds is not None:
        supervisor.beat()
        await asyncio.sleep(supervisor.seconds / 4)
    await asyncio.Event().wait()


async def _ended(task: asyncio.Future[None]) -> None:
    task.cancel()
    await asyncio.wait([task])


async def _first(*waits: Any) -> None:
    """Until one of them is done."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            if not task.done():
                task.cancel()
