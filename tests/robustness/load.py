"""Load test of `rlrc serve` with all four protocols, fifteen honest clients and a malicious one, and of the stop.

    python tests/robustness/load.py reference/compressed --minutes 10 --stop-seconds 20 --out serving_load.json

Three phases: one honest client alone (a quarter of --minutes), all honest clients (half of it), and all clients
(--minutes). Honest clients send observations at a rate that keeps the policy busy for a fifth of the time. The
malicious client may raise the p99 latency of the honest ones by at most the factor ``ALLOWED``. The ratio to one client
alone is reported without a limit, since it includes the queue of fifteen clients for one policy.

Then stops are sent to another `rlrc serve --page` and to `rlrc run --port` during each attack of load_http.py
(--stop-seconds each) on all HTTP ports, including the stop port. On the stop port, no stop may fail, and the 99th
percentile of the time is limited to ``STOP_MS``. Times through the page port are reported without a limit.

Exit code 1 if a limit is exceeded, memory grows, an honest client is refused, or the server exits.
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
from load_clients import OPEN, Client, Monitor, inference_seconds, make_observation, once
from tyro.conf import Positional

from rlrc import artifact as artifacts
from rlrc.benchmarks.cli.output import progress
from rlrc.benchmarks.results import machine
from rlrc.benchmarks.results.results import check_out, dump, write
from rlrc.errors import UserError
from rlrc.runtime.servers.client import RemotePolicy
from rlrc.runtime.wire import arrays

HONEST = ("openpi",) * 13 + ("openvla", "gr00t")
BUSY = 0.2  # share of the time in which the policy computes
ALLOWED = 1.5
GROWTH_MB = 64.0  # allowed growth of the server after the first minute of attack, for the connections that it holds
SETTLED_S = 60.0
STOP_MS = 100.0


@dataclass(frozen=True)
class Server:
    """A process of `rlrc serve` or `rlrc run` on free loopback ports.

    ``ports``: by protocol, plus "page" and "stop"; ``page``: link with the token; ``stop``: URL to POST to.
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
def serve(artifact: Path, log: Path) -> Iterator[Server]:
    """Run `rlrc serve`. Raises UserError if it does not become ready."""
    options = ["--port", "0", "--protocol", *OPEN, "--mapping", "openvla", "openvla-oft", "--page", "0"]
    with start("serve", artifact, log, [*options, "--waiting", str(len(HONEST) + 1)], "ready:") as server:
        yield server


@contextmanager
def run_loop(artifact: Path, log: Path, profile: str) -> Iterator[Server]:
    """Run `rlrc run` at 20 Hz; after a stop, the loop keeps running and waits to be re-armed."""
    options = ["--driver", "load_robot:open_robot", "--instruction", "open the drawer", "--profile", profile]
    options += ["--hz", "20", "--late", "10", "--rearm", "--port", "0"]
    with start("run", artifact, log, options, "stop:") as server:
        yield server


@contextmanager
def start(command: str, artifact: Path, log: Path, options: Sequence[str], last: str) -> Iterator[Server]:
    """Start a command and wait until it has printed a line that begins with ``last``."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])}
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "rlrc.runtime.cli", command, str(artifact), *options],
            env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, text=True,
        )  # fmt: skip
    try:
        assert process.stdout is not None
        lines = [process.stdout.readline()]
        while lines[-1] and not lines[-1].startswith(last):
            lines.append(process.stdout.readline())
        if not lines[-1]:
            raise UserError(f"expected rlrc {command} to start, found {log.read_text()[-300:].strip()}; see there")
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
    """Load test of `rlrc serve` and of the stop. Needs the extras "serve" and "dev".

    ``stop_seconds``: for each attack; ``attacks``: attacks during which stops are sent (default: all of load_http.py);
    ``profile``: robot limits of `rlrc run`, which must match the policy.
    """
    check_out(out, force)
    if unknown := set(attacks) - set(load_http.ATTACKS):
        raise UserError(f"expected attacks from {', '.join(load_http.ATTACKS)}, found {unknown.pop()}; choose of these")
    if minutes <= 0 or stop_seconds <= 0:
        raise UserError(f"expected minutes and seconds above 0, found {minutes:g} and {stop_seconds:g}; give more")
    observation = make_observation(artifacts.load(artifact, verify=()).manifest.policy)
    seconds = minutes * 60
    with tempfile.TemporaryDirectory() as folder, serve(artifact, Path(folder) / "server.log") as server:
        ports = server.ports
        period_s = len(HONEST) * measure_inference(ports["openpi"], observation) / BUSY
        with progress("seconds", round(seconds * 1.75)) as tick:
            alone = phase("alone", HONEST[:1], server, observation, period_s, seconds / 4, tick)
            before = phase("honest", HONEST, server, observation, period_s, seconds / 2, tick)
            with (
                Monitor(server.process.pid, ports["openpi"], observation) as monitor,
                run_attacker(ports, observation) as attacks_made,
            ):
                during = phase("honest and malicious", HONEST, server, observation, period_s, seconds, tick)
        rows, memory = [alone, before, during], memory_growth(monitor.samples, seconds)
        afterwards = check_and_stop(server, observation)
    stop_rows = stops(artifact, stop_seconds, profile, attacks or tuple(load_http.ATTACKS))
    ratios = {
        "p99_beside_malicious_to_honest": during["p99_ms"] / before["p99_ms"],
        "p99_honest_to_alone": before["p99_ms"] / alone["p99_ms"],
        "p99_beside_malicious_to_alone": during["p99_ms"] / alone["p99_ms"],
    }
    failed = faults(ratios, memory, rows, monitor.newcomers, afterwards) + late_stops(stop_rows)
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
        "newcomers": monitor.newcomers,
        "malicious": attacks_made,
        "memory": memory,
        "afterwards": afterwards,
        "stop_allowed_ms": STOP_MS,
        "stops": stop_rows,
    }
    if out is not None:
        write(out, dump(result))
    print_result(result)
    return int(bool(failed))


def stops(artifact: Path, seconds: float, profile: str, attacks: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Times of stops during each attack, by command."""
    rows = {}
    with tempfile.TemporaryDirectory() as folder, progress("attacks", 2 * len(attacks)) as tick:
        log = Path(folder) / "log"
        for name, command in (("serve", serve(artifact, log)), ("run", run_loop(artifact, log, profile))):
            with command as server:
                ports = [server.ports[protocol] for protocol in load_attacks.HTTP if protocol in server.ports]
                operator = server.operator()
                try:
                    rows[name] = load_http.stops(operator, ports, seconds, tick, attacks)
                finally:
                    operator.close()
                if server.process.poll() is not None:
                    raise UserError(f"expected rlrc {name} to run, found {log.read_text()[-300:].strip()}; see there")
    return rows


def late_stops(stop_rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """Describe stops on the stop port that took too long or failed."""
    messages = []
    for command, rows in stop_rows.items():
        for row in rows:
            for way in ("kept", "new"):
                if row[way]["p99_ms"] > STOP_MS or row[way]["failed"]:
                    took = f"{row[way]['p99_ms']:.0f} ms, failed {dict(row[way]['failed'])}"
                    messages.append(f"stop of rlrc {command} during {row['attack']} ({way} connection): p99 {took}")
    return messages


def measure_inference(port: int, observation: Mapping[str, Any]) -> float:
    """Median seconds of an inference."""
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
    """Run an honest client per protocol for ``seconds``. Returns a row of the result."""
    clients = [Client(protocol) for protocol in protocols]
    threads = [
        threading.Thread(
            target=client.run, args=(server.ports[client.protocol], observation, period_s, seconds, number)
        )
        for number, client in enumerate(clients)
    ]
    busy_s, begun, reported = inference_seconds(server.ports["openpi"]), time.monotonic(), 0
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive():
            thread.join(1.0)
            now = min(round(time.monotonic() - begun), round(seconds))
            tick(now - reported)
            reported = now
    elapsed = time.monotonic() - begun
    busy_s = inference_seconds(server.ports["openpi"]) - busy_s
    refused = sum((client.refused for client in clients), Counter[str]())
    return {
        "name": name,
        "clients": len(clients),
        "seconds": round(elapsed, 1),
        "busy": round(busy_s / elapsed, 3),
        "load": os.getloadavg()[0],
        **percentiles([value for client in clients for value in client.milliseconds]),
        "refused": refused,
        "skipped": sum(client.skipped for client in clients),
        "each": [{"protocol": client.protocol, **percentiles(client.milliseconds)} for client in clients],
    }


def percentiles(milliseconds: list[float]) -> dict[str, float]:
    if not milliseconds:
        raise UserError("expected answers to an honest client, found none; check the server")
    p50, p99, most = np.percentile(milliseconds, (50, 99, 100)).round(3).tolist()
    return {"calls": len(milliseconds), "p50_ms": p50, "p99_ms": p99, "max_ms": most}


@contextmanager
def run_attacker(ports: Mapping[str, int], observation: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Run the malicious client in a separate process. On exit, the map contains what it did."""
    context = multiprocessing.get_context("spawn")
    ending, results, summary = context.Event(), context.SimpleQueue(), {}
    arguments = (dict(ports), arrays.pack(dict(observation)), ending, results)
    process = context.Process(target=load_attacks.run, args=arguments)
    process.start()
    try:
        yield summary
        ending.set()
        summary |= results.get()
        process.join()
    finally:
        process.kill()


def memory_growth(samples: list[dict[str, float]], seconds: float) -> dict[str, Any]:
    """Memory of the server during the attack in MB, and its growth after the first minute."""
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


def check_and_stop(server: Server, observation: Mapping[str, Any]) -> dict[str, Any]:
    """Send an observation by every protocol, then stop the server. Returns answers, exit code and log statistics."""
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
    """Describe the requirements that the server did not meet."""
    refused = sum(sum(row["refused"].values()) for row in rows)
    rejected = sum(newcomers.values()) - newcomers["answered"]
    answers = set(afterwards["answers"].values())
    ratio = ratios["p99_beside_malicious_to_honest"]
    checks = {
        f"p99 {ratio:.2f} times that without the malicious client": ratio <= ALLOWED,
        f"{memory['server_growth_mb']} MB growth after the first minute": memory["server_growth_mb"] <= GROWTH_MB,
        f"{refused} honest observations refused": refused == 0,
        f"{rejected} new clients rejected": rejected == 0,
        f"answers after the attack: {afterwards['answers']}": answers == {"answered"},
        f"exit code {afterwards['exit_code']}": afterwards["exit_code"] == 0,
        f"{afterwards['tracebacks']} tracebacks in the log": afterwards["tracebacks"] == 0,
    }
    return [description for description, passed in checks.items() if not passed]


def print_result(result: Mapping[str, Any]) -> None:
    for row in result["rows"]:
        print(f"{row['name']}: p50 {row['p50_ms']:.1f}, p99 {row['p99_ms']:.1f} ms, {row['calls']} calls, "
              f"{sum(row['refused'].values())} refused, policy busy {row['busy']:.0%}")  # fmt: skip
    for name, ratio in result["ratios"].items():
        print(f"{name}: {ratio:.2f}" + (f" (allowed: {ALLOWED})" if name == result["compared"] else ""))
    for command, rows in result["stops"].items():
        for way in ("kept", "new", "page"):
            worst = max(rows, key=lambda row: row[way]["p99_ms"])
            print(f"stops of rlrc {command}, {way}: p99 up to {worst[way]['p99_ms']:.1f} ms, during {worst['attack']}")
    memory = {name: value for name, value in result["memory"].items() if name not in ("samples", "columns")}
    print(f"malicious: {result['malicious']}", f"newcomers: {dict(result['newcomers'])}", memory, sep="\n")
    print(f"afterwards: {result['afterwards']}", f"failed: {result['failed'] or 'nothing'}", sep="\n")


if __name__ == "__main__":
    try:
        sys.exit(tyro.cli(main))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
