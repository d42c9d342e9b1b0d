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
from rlrc.runtime.servers.key_mapping import OWN
from rlrc.runtime.servers.observations import Observations
from rlrc.runtime.servers.openpi import OpenpiServer
from rlrc.runtime.servers.session import WAITING, Session
from rlrc.runtime.wire import logs
from rlrc.runtime.wire.ports import Access, access, check_plain, token, url
from rlrc.tables import plain_console

DRAIN_S = 10.0
DEFAULT_MAPPINGS = {"openvla": "openvla"}  # the others use OWN
SCHEMES = {"openpi": "ws", "openvla": "http", "gr00t": "tcp", "lerobot": "grpc"}


@dataclass(frozen=True)
class Serve:
    """Serve a policy to unmodified clients of openpi, OpenVLA, GR00T or LeRobot, until Ctrl-C (docs/serving.md)."""

    path: Positional[Path]
    """the artifact"""
    protocol: tuple[Literal["openpi", "openvla", "gr00t", "lerobot"], ...] = ("openpi",)
    """protocols, each on its own port"""
    host: str = "127.0.0.1"
    """address to listen on; one that other machines can reach needs --token, --certificate and --key, or --insecure"""
    port: tuple[int, ...] = (8000,)
    """ports in the order of the protocols; missing ones count up from the last; 0: any free port"""
    mapping: dict[str, str] = field(default_factory=dict)
    """pairs of a protocol and the mapping of its clients' keys: own (the policy's names), libero, droid, aloha,
    openvla, openvla-oft, gr00t-libero, gr00t-droid, gr00t-so100, or a TOML file (default: own; openvla for openvla)"""
    instruction: str | None = None
    """instruction for clients that send none"""
    profile: str | None = None
    """limit all actions by a robot's profile: a TOML file, or the name of a built-in one; needs --hz"""
    hz: float | None = None
    """rate at which the client executes actions, for the guard"""
    page: int | None = None
    """port of the operator's page: images, latency, guard, stop, re-arming; 0: any free port"""
    stop_port: int | None = None
    """port of the stop (POST /stop), which works even if other ports are busy (default: any free port)"""
    log: Literal["text", "json"] = "text"
    """format of the log on stderr: text, or one JSON object per line"""
    token: str | None = None
    """token of the clients (or RLRC_TOKEN in the environment), as Authorization: Api-Key TOKEN, or Bearer"""
    certificate: Path | None = None
    """PEM file with the certificate, for TLS"""
    key: Path | None = None
    """PEM file with its key"""
    insecure: bool = False
    """listen beyond this machine without a token or TLS: anyone who reaches the port can move the robot"""
    waiting: int = WAITING
    """length of the queue of observations; more are refused"""
    backend: Backend | None = None
    """which of the artifact's graphs to run (default: the first available of onnxruntime, tensorrt, gguf)"""
    threads: int = 1
    """threads of the engine"""

    def run(self) -> int:
        if self.waiting < 1:
            raise UserError(f"expected --waiting of 1 or more, found {self.waiting}; correct it")
        if not self.protocol or len(set(self.protocol)) != len(self.protocol):
            raise UserError(f"expected every protocol once, found {' '.join(self.protocol) or 'none'}; correct it")
        if self.stop_port is not None and self.page is None:
            raise UserError("expected --page with --stop-port, found none; give --page 0 for any free port")
        if strange := sorted(self.mapping.keys() - set(self.protocol)):
            raise UserError(f"expected mappings of {', '.join(self.protocol)}, found one of {strange[0]}; leave it out")
        allowed = access(self.host, token(self.token), self.certificate, self.key, self.insecure)
        check_plain(self.host, self.protocol, self.insecure)
        artifact = artifacts.load(self.path, verify=())  # the inference process verifies the graphs
        spec = artifact.manifest.policy
        guarded, ports = self._guarded(spec), self._ports()
        mapped: dict[str, Observations] = {
            name: observations.load(
                self.mapping.get(name, DEFAULT_MAPPINGS.get(name, OWN)), spec, self.instruction, name
            )
            for name in self.protocol
        }
        realtime.return_large_blocks()
        logs.configure(self.log)
        logging.getLogger("rlrc.runtime.servers.openpi.frames").setLevel(logging.CRITICAL)  # port scans cause errors
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
        """Returns why the policy failed; None: the server was asked to end."""
        console, stop, supervisor = plain_console(), asyncio.Event(), Supervisor.from_environment()
        session = Session(artifact.manifest.policy, guarded, self.waiting)
        kinds = {name: _load_server(name) for name in mapped}
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        async with AsyncExitStack() as stack:
            stack.callback(session.close)
            for (name, mapping), port in zip(mapped.items(), ports, strict=True):
                server = kinds[name](session, mapping, allowed)
                found = await server.start(self.host, port)
                stack.push_async_callback(server.stop)
                scheme = SCHEMES[name] + ("s" if allowed.tls and name in ("openpi", "openvla") else "")
                console.print(
                    f"{name}: {url(scheme, self.host, found)}  {'; '.join(mapping.description)}", soft_wrap=True
                )
            if self.page is not None:
                await self._open_page(artifact, session, stack)
            opening = asyncio.ensure_future(
                session.open(LocalPolicy.load, (self.path, self.threads, True, self.backend))
            )
            await _wait_for_first(opening, stop.wait())
            if not stop.is_set():
                opening.result()
                console.print(f"ready: {session.inference.warmth}", soft_wrap=True)
                supervisor.ready(f"serving {self.path}")
                await _wait_for_first(stop.wait(), session.inference.failed.wait(), _beat(supervisor))
            supervisor.stopping(session.inference.failure or "asked to end")
            await session.drain(DRAIN_S)
        return session.inference.failure

    async def _open_page(self, artifact: Artifact, session: Session, stack: AsyncExitStack) -> None:
        """Open the page in its own process; the server continues if that process ends."""
        from rlrc.runtime.page.feed import Address
        from rlrc.runtime.page.metadata import page_metadata
        from rlrc.runtime.page.process import Page
        from rlrc.runtime.page.server_page import SessionPage

        guard = None if session.guarded is None else session.guarded.guard
        chunk_ms = None if self.hz is None else session.spec.action.horizon / self.hz * 1e3  # duration of a chunk
        can = {"stop", "rearm", "bench"} | (set() if session.spec.prompt is None else {"instruction"})
        facts = {"protocols": ", ".join(self.protocol)}
        metadata = page_metadata("serve", artifact, None if guard is None else guard.profile, chunk_ms, can, **facts)
        address = Address(self.host, self.page or 0, token(self.token), self.certificate, self.key, self.stop_port or 0)
        page = Page(metadata, [camera.name for camera in session.spec.cameras], address)
        stack.callback(page.close)
        showing = asyncio.ensure_future(SessionPage(page, session).run())
        stack.push_async_callback(_cancel, showing)  # before the page closes the socket
        plain_console().print(f"page: {page.link}", soft_wrap=True)
        plain_console().print(f"stop: POST {page.stop.url}", soft_wrap=True)

    def _guarded(self, spec: PolicySpec) -> GuardedChunks | None:
        if self.profile is None:
            return None
        if self.hz is None:
            raise UserError("expected --hz with --profile, found none; give the client's rate of actions")
        names, units = ((), ()) if spec.state is None else (spec.state.names, spec.state.units)
        return GuardedChunks(Guard(profile.load(self.profile), self.hz, spec.action, names, units))

    def _ports(self) -> list[int]:
        ports = list(self.port)
        if not 0 < len(ports) <= len(self.protocol):
            raise UserError(
                f"expected 1 to {len(self.protocol)} ports, one for each of {', '.join(self.protocol)}, found "
                f"{len(ports)}; correct --port"
            )
        while len(ports) < len(self.protocol):
            ports.append(ports[-1] + 1 if ports[-1] else 0)
        if not all(0 <= port < 2**16 for port in ports):
            raise UserError(f"expected ports of 0 to 65535, found {ports}; correct --port")
        return ports


def _load_server(name: str) -> Callable[..., Any]:
    """Import only the module of a protocol in use, since some need the extra "serve"."""
    if name == "openpi":
        return OpenpiServer
    server: Callable[..., Any] = getattr(import_module(f"rlrc.runtime.servers.{name}"), f"{name.capitalize()}Server")
    return server


async def _beat(supervisor: Supervisor) -> None:
    """Report to the supervisor while the event loop runs; the session detects a hanging policy."""
    while supervisor.seconds is not None:
        supervisor.beat()
        await asyncio.sleep(supervisor.seconds / 4)
    await asyncio.Event().wait()


async def _cancel(task: asyncio.Future[None]) -> None:
    task.cancel()
    await asyncio.wait([task])


async def _wait_for_first(*waits: Any) -> None:
    """Wait until one of them is done, and cancel the rest."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            if not task.done():
                task.cancel()
