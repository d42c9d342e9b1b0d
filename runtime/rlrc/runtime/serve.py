"""The command that serves a policy over the network: `rlrc serve`. The field docstrings are the help."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from rlrc import artifact as artifacts
from rlrc.artifact import PolicySpec
from rlrc.errors import UserError
from rlrc.runtime import profile
from rlrc.runtime.backends import Backend
from rlrc.runtime.commands import check_failed
from rlrc.runtime.describe import plain_console
from rlrc.runtime.guard import Guard
from rlrc.runtime.policy import LocalPolicy
from rlrc.runtime.servers import observations
from rlrc.runtime.servers.guarded import GuardedChunks
from rlrc.runtime.servers.observations import Observations
from rlrc.runtime.servers.openpi import OpenpiServer
from rlrc.runtime.servers.ports import Access, access, check_plain
from rlrc.runtime.servers.session import WAITING, Session

TOKEN = "RLRC_TOKEN"  # in the environment: other users of the machine do not see it, as they see arguments
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
        if strange := sorted(self.mapping.keys() - set(self.protocol)):
            raise UserError(f"expected mappings of {', '.join(self.protocol)}, found one of {strange[0]}; leave it out")
        allowed = access(self.host, self.token or os.environ.get(TOKEN), self.certificate, self.key, self.insecure)
        check_plain(self.host, self.protocol, self.insecure)
        spec = artifacts.load(self.path, verify=()).manifest.policy  # the process that infers checks the graphs
        guarded, ports = self._guarded(spec), self._ports()
        mapped: dict[str, Observations] = {
            name: observations.load(
                self.mapping.get(name, DEFAULT_MAPPINGS.get(name, observations.OWN)), spec, self.instruction, name
            )
            for name in self.protocol
        }
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
        logging.getLogger("rlrc.runtime.servers.openpi.frames").setLevel(logging.CRITICAL)  # every port scan is one
        failure = asyncio.run(self._serve(Session(spec, guarded, self.waiting), mapped, ports, allowed))
        return 0 if failure is None else check_failed(failure)

    async def _serve(
        self, session: Session, mapped: dict[str, Observations], ports: list[int], allowed: Access
    ) -> str | None:
        """-> why it ended; None: somebody asked for it."""
        console, asked = plain_console(), asyncio.Event()
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
                console.print(f"{name}: {scheme}://{self.host}:{found}  {'; '.join(mapping.told)}", soft_wrap=True)
            opening = asyncio.ensure_future(
                session.open(LocalPolicy.load, (self.path, self.threads, True, self.backend))
            )
            await _first(opening, asked.wait())
            if not asked.is_set():
                opening.result()
                console.print(f"ready: {session.warmth}", soft_wrap=True)
                await _first(asked.wait(), session.failed.wait())
            await session.drain(DRAIN_S)
        return session.failure

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


async def _first(*waits: Any) -> None:
    """Until one of them is done."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            if not task.done():
                task.cancel()
