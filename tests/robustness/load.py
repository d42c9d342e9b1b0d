"""Fifteen honest clients and a malicious one at `rlrc serve` with all four protocols: does it hurt the honest ones, and
does an operator's stop arrive?

    python tests/robustness/load.py reference/compressed --minutes 10 --stop-seconds 20 --out serving_load.json

Three phases: one honest client alone (a quarter of the time), the honest ones (half of it), and those beside the
malicious one (--minutes). The honest ones ask at a rate at which the policy is busy a fifth of the time, all phases the
same. What is asked of the server: the p99 of the honest ones beside the malicious one is at most ``ALLOWED`` of that
without it. Against the p99 of the one alone, it tells of the queue for one policy, too, in which fifteen meet.

Then stops are sent while one attack after the other (load_http.py, --stop-seconds for each) floods every port that
speaks HTTP, that of the stop itself included: to another `rlrc serve --page`, and to `rlrc run --port`. Asked:
``STOP_MS`` at the 99th percentile on the stop's own port, and none that fails. The times of stops through the page's
port are reported without a limit.

Exit code 1: the server did not keep that, grew, refused an honest client, or ended.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import load_attacks
import load_http
import numpy as np
import tyro
from load_clients import OPEN, Client, Watch, inference_seconds, observation_of, once
from tyro.conf import Positional

from rlrc import artifact as artifacts
from rlrc.benchmarks.cli.output import progress
from rlrc.benchmarks.results import machine
from rlrc.benchmarks.results.results import check_out, dump, write
from rlrc.errors import UserError
from rlrc.runtime.servers.client import RemotePolicy
from rlrc.runtime.wire import arrays

HONEST = ("openpi",) * 13 + ("openvla", "gr00t")
BUSY = 0.2  # of the policy's time
ALLOWED = 1.5
GROWTH_MB = 64.0  # of the server's memory after the first minute beside the malicious client, for what it keeps of it
SETTLED_S = 60.0
STOP_MS = 100.0


@dataclass(frozen=True)
class Server:
    """`rlrc serve` or `rlrc run` as an operator starts it, ports of the loopback that were free.

    ``ports``: by protocol, and of the page and its stop; ``page``: the link; ``stop``: where to POST.
    """

    process: subprocess.Popen[str]
    ports: dict[str, int]
    log: Path
    page: str
    stop: str

    def operator(self) -> load_http.Operator:
        url, token = self.page.split("/#")
        return load_http.Operator(self.stop, url, token)


@contextmanager
def served(artifact: Path, log: Path) -> Iterator[Server]:
    """Raises UserError if it does not get ready."""
    options = ["--port", "0", "--protocol", *OPEN, "--mapping", "openvla", "openvla-oft", "--page", "0"]
    with started("serve", artifact, log, [*options, "--waiting", str(len(HONEST) + 1)], "ready:") as server:
        yield server


@contextmanager
def running(artifact: Path, log: Path, profile: str) -> Iterator[Server]:
    """A loop at 20 Hz that holds the robot after a stop, and goes on."""
    options = ["--driver", "load_robot:open_robot", "--instruction", "open the drawer", "--profile", profile]
    with started(
        "run", artifact, log, [*options, "--hz", "20", "--late", "10", "--rearm", "--port", "0"], "stop:"
    ) as server:
        yield server


@contextmanager
def started(what: str, artifact: Path, log: Path, options: Sequence[str], last: str) -> Iterator[Server]:
    """Once it has printed a line that begins with ``last``."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])}
    with log.open("w") as complaints:
        process = subprocess.Popen(
            [sys.executable, "-m", "rlrc.runtime.cli", what, str(artifact), *options],
            env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=complaints, text=True,
        )  # fmt: skip
    try:
        assert process.stdout is not None
        lines = [process.stdout.readline()]
        while lines[-1] and not lines[-1].startswith(last):
            lines.append(process.stdout.readline())
        if not lines[-1]:
            raise UserError(f"expected rlrc {what} to get ready, found: {log.read_text()[-300:].strip()}; see above")
        words = {line.split()[0].rstrip(":"): line.split() for line in lines}
        ports = {name: int(words[name][1].rpartition(":")[2]) for name in OPEN if name in words}
        page, stop = words["page"][1], words["stop"][2]
        ports |= {"page": urlsplit(page).port or 0, "stop": urlsplit(stop).port or 0}
        yield Server(process, ports, log, page, stop)
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def main(
    artifact: Positional[Path],
    minutes: float = 10.0,
    stop_seconds: float = 20.0,
    attacks: tuple[str, ...] = (),
    profile: str = "metaworld",
    out: Path | None = None,
    force: bool = False,
) -> int:
    """Needs the extra "serve", and pyzmq of "dev".

    ``stop_seconds``: for each attack; ``attacks``: beside which stops are sent (default: all of load_http.py);
    ``profile``: the limits of `rlrc run`'s robot, which have to fit the policy.
    """
    check_out(out, force)
    if unknown := set(attacks) - set(load_http.ATTACKS):
        raise UserError(f"expected attacks of {', '.join(load_http.ATTACKS)}, found {unknown.pop()}; choose of those")
    if minutes <= 0 or stop_seconds <= 0:
        raise UserError(f"expected minutes and seconds above 0, found {minutes:g} and {stop_seconds:g}; give more")
    observation = observation_of(artifacts.load(artifact, verify=()).manifest.policy)
    seconds = minutes * 60
    with tempfile.TemporaryDirectory() as folder, served(artifact, Path(folder) / "server.log") as server:
        ports = server.ports
        period_s = len(HONEST) * inference_s(ports["openpi"], observation) / BUSY
        with progress("seconds", round(seconds * 1.75)) as tick:
            alone = phase("alone", HONEST[:1], server, observation, period_s, seconds / 4, tick)
            before = phase("honest", HONEST, server, observation, period_s, seconds / 2, tick)
            with Watch(server.process.pid, ports["openpi"], observation) as watch, malicious(ports, observation) as did:
                beside = phase("honest and malicious", HONEST, server, observation, period_s, seconds, tick)
        rows, memory = [alone, before, beside], grown(watch.samples, seconds)
        afterwards = after(server, observation)
    stopped = stops(artifact, stop_seconds, profile, attacks or tuple(load_http.ATTACKS))
    ratios = {
        "p99_beside_malicious_to_honest": beside["p99_ms"] / before["p99_ms"],
        "p99_honest_to_alone": before["p99_ms"] / alone["p99_ms"],
        "p99_beside_malicious_to_alone": beside["p99_ms"] / alone["p99_ms"],
    }
    failed = faults(ratios, memory, rows, watch.newcomers, afterwards) + late(stopped)
    result = {
        "kind": "load",
        "command": f"python tests/robustness/load.py {machine.command().removeprefix('rlrc ')}",
        "machine": machine.describe(1),
        "compared": "p99_beside_malicious_to_honest",
        "allowed": ALLOWED,
        "ratios": ratios,
        "failed": failed,
        "period_s": period_s,
        "rows": rows,
        "newcomers": watch.newcomers,
        "malicious": did,
        "memory": memory,
        "afterwards": afterwards,
        "stop_allowed_ms": STOP_MS,
        "stops": stopped,
    }
    if out is not None:
        write(out, dump(result))
    tell(result)
    return int(bool(failed))


def stops(artifact: Path, seconds: float, profile: str, attacks: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """How long stops take beside each attack, by the program that is to stop."""
    found = {}
    with tempfile.TemporaryDirectory() as folder, progress("attacks", 2 * len(attacks)) as tick:
        log = Path(folder) / "log"
        for name, start in (("serve", served(artifact, log)), ("run", running(artifact, log, profile))):
            with start as server:
                ports = [server.ports[speaker] for speaker in load_attacks.HTTP if speaker in server.ports]
                operator = server.operator()
                try:
                    found[name] = load_http.stops(operator, ports, seconds, tick, attacks)
                finally:
                    operator.close()
                if server.process.poll() is not None:
                    raise UserError(
                        f"expected rlrc {name} to go on, found: {log.read_text()[-300:].strip()}; see above"
                    )
    return found


def late(stopped: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """Stops on their own port that took too long or failed."""
    found = []
    for program, rows in stopped.items():
        for row in rows:
            for way in ("kept", "new"):
                if row[way]["p99_ms"] > STOP_MS or row[way]["failed"]:
                    took = f"{row[way]['p99_ms']:.0f} ms, failed {dict(row[way]['failed'])}"
                    found.append(f"stop of rlrc {program} beside {row['attack']} ({way} connection): p99 {took}")
    return found


def inference_s(port: int, observation: Mapping[str, Any]) -> float:
    """What the policy needs for one."""
    with RemotePolicy(f"ws://127.0.0.1:{port}", timeout_s=30) as policy:
        return statistics.median(policy.infer(observation)["timing"]["decoder_ms"] for _ in range(50)) / 1e3


def phase(
    name: str,
    protocols: Sequence[str],
    server: Server,
    observation: Mapping[str, Any],
    period_s: float,
    seconds: float,
    tick: Callable[[int], None],
) -> dict[str, Any]:
    """So many honest clients for so long: -> a row of the result."""
    clients = [Client(protocol) for protocol in protocols]
    threads = [
        threading.Thread(
            target=client.run, args=(server.ports[client.protocol], observation, period_s, seconds, number)
        )
        for number, client in enumerate(clients)
    ]
    worked, begun, shown = inference_seconds(server.ports["openpi"]), time.monotonic(), 0
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive():
            thread.join(1.0)
            now = min(round(time.monotonic() - begun), round(seconds))
            tick(now - shown)
            shown = now
    lasted = time.monotonic() - begun
    worked = inference_seconds(server.ports["openpi"]) - worked
    refused = sum((client.refused for client in clients), Counter[str]())
    return {
        "name": name,
        "clients": len(clients),
        "seconds": round(lasted, 1),
        "busy": round(worked / lasted, 3),
        "load": os.getloadavg()[0],
        **percentiles([value for client in clients for value in client.milliseconds]),
        "refused": refused,
        "skipped": sum(client.skipped for client in clients),
        "each": [{"protocol": client.protocol, **percentiles(client.milliseconds)} for client in clients],
    }


def percentiles(milliseconds: list[float]) -> dict[str, float]:
    if not milliseconds:
        raise UserError("expected answers to an honest client, found none; look at the server's log")
    p50, p99, most = np.percentile(milliseconds, (50, 99, 100)).round(3).tolist()
    return {"calls": len(milliseconds), "p50_ms": p50, "p99_ms": p99, "max_ms": most}


@contextmanager
def malicious(ports: Mapping[str, int], observation: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """In a process of its own. What it did is in the map at the end."""
    context = multiprocessing.get_context("spawn")
    ending, results, did = context.Event(), context.SimpleQueue(), {}
    arguments = (dict(ports), arrays.pack(dict(observation)), ending, results)
    process = context.Process(target=load_attacks.run, args=arguments)
    process.start()
    try:
        yield did
        ending.set()
        did |= results.get()
        process.join()
    finally:
        process.kill()


def grown(samples: list[dict[str, float]], seconds: float) -> dict[str, Any]:
    """What the server took beside the malicious client, in MB, and by how much more than after the first minute."""
    settled = next(one for one in samples if one["seconds"] >= min(SETTLED_S, seconds / 2))
    later = [one for one in samples if one["seconds"] >= settled["seconds"]]
    return {
        "server_growth_mb": round(max(one["server_mb"] for one in later) - settled["server_mb"], 1),
        "inference_growth_mb": round(max(one["inference_mb"] for one in later) - settled["inference_mb"], 1),
        "server_most_mb": max(one["server_mb"] for one in samples),
        "most_files": max(one["files"] for one in samples),
        "samples": [list(one.values()) for one in samples],
        "columns": list(samples[0]),
    }


def after(server: Server, observation: Mapping[str, Any]) -> dict[str, Any]:
    """Whether every protocol still answers, and how the server ends when it is told to."""
    answers = {name: once(name, server.ports[name], observation) or "answered" for name in OPEN}
    server.process.send_signal(signal.SIGTERM)
    code = server.process.wait(30)
    log = server.log.read_text(errors="replace")
    tracebacks = log.count("Traceback (most recent call last)")
    if tracebacks:
        print(log[log.index("Traceback") :][:3000], file=sys.stderr)
    return {"answers": answers, "exit_code": code, "tracebacks": tracebacks, "log_bytes": len(log)}


def faults(
    ratios: Mapping[str, float],
    memory: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    newcomers: Mapping[str, int],
    afterwards: Mapping[str, Any],
) -> list[str]:
    """What the server did not keep."""
    refused = sum(sum(row["refused"].values()) for row in rows)
    turned_away = sum(newcomers.values()) - newcomers["answered"]
    answers = set(afterwards["answers"].values())
    ratio = ratios["p99_beside_malicious_to_honest"]
    checks = {
        f"p99 {ratio:.2f} of that without the malicious client": ratio <= ALLOWED,
        f"{memory['server_growth_mb']} MB more after the first minute": memory["server_growth_mb"] <= GROWTH_MB,
        f"{refused} honest observations refused": refused == 0,
        f"{turned_away} new clients turned away": turned_away == 0,
        f"afterwards {afterwards['answers']}": answers == {"answered"},
        f"exit code {afterwards['exit_code']}": afterwards["exit_code"] == 0,
        f"{afterwards['tracebacks']} tracebacks in the log": afterwards["tracebacks"] == 0,
    }
    return [what for what, kept in checks.items() if not kept]


def tell(result: Mapping[str, Any]) -> None:
    for row in result["rows"]:
        print(f"{row['name']}: p50 {row['p50_ms']:.1f}, p99 {row['p99_ms']:.1f} ms, {row['calls']} calls, "
              f"{sum(row['refused'].values())} refused, policy busy {row['busy']:.0%}")  # fmt: skip
    for name, ratio in result["ratios"].items():
        print(f"{name}: {ratio:.2f}" + (f" (allowed: {ALLOWED})" if name == result["compared"] else ""))
    for program, stopped in result["stops"].items():
        for way in ("kept", "new", "page"):
            worst = max(stopped, key=lambda row: row[way]["p99_ms"])
            print(
                f"stops of rlrc {program}, {way}: p99 at most {worst[way]['p99_ms']:.1f} ms, beside {worst['attack']}"
            )
    memory = {name: value for name, value in result["memory"].items() if name not in ("samples", "columns")}
    print(f"malicious: {result['malicious']}", f"newcomers: {dict(result['newcomers'])}", memory, sep="\n")
    print(f"afterwards: {result['afterwards']}", f"failed: {result['failed'] or 'nothing'}", sep="\n")


if __name__ == "__main__":
    try:
        sys.exit(tyro.cli(main))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
