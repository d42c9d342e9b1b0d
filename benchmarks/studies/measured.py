"""Run a command alone and measure what it needs: memory, processor time, time, bytes written."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

INTERVAL_S = 0.05


@dataclass(frozen=True)
class Kill:
    """Send a signal to the command's processes ``after_s`` seconds after its start.

    With ``exists``: after the first path that fits this pattern is there. With ``says``: after the command has printed
    text that fits this pattern.
    """

    after_s: float = 0.0
    exists: str = ""
    says: str = ""
    signal: Literal["KILL", "INT", "TERM"] = "KILL"


@dataclass(frozen=True)
class Usage:
    """What a command took. Bytes are sums over its processes at the worst moment; times include ended children.

    ``anonymous`` is what the machine must have: pages that only swap could take over. A peak of the resident set
    counts besides the pages of mapped files (``file`` of ``resident``), which the system drops when it needs room, so
    that a command that maps 15 GB of weights shows 15 GB wherever they fit, and less elsewhere.
    """

    exit_code: int = 0  # negative: the signal that ended it
    anonymous: int = 0
    resident: int = 0
    file: int = 0
    written: int = 0
    cpu_s: float = 0.0
    wall_s: float = 0.0
    killed: bool = False

    def __add__(self, later: Usage) -> Usage:
        """Of two runs of one command, the second of which goes on where the first one was interrupted."""
        larger = max(self, later, key=lambda usage: usage.resident)
        return replace(
            later,
            anonymous=max(self.anonymous, later.anonymous),
            resident=larger.resident,
            file=larger.file,
            written=self.written + later.written,
            cpu_s=self.cpu_s + later.cpu_s,
            wall_s=self.wall_s + later.wall_s,
        )


def measure(
    command: Sequence[str],
    output: Path,
    environment: Mapping[str, str] | None = None,
    kill: Kill | None = None,
) -> Usage:
    """Run the command to its end, or until ``kill`` ends it. ``output`` gets what it prints.

    Memory is read every 50 ms, so shorter peaks are missed; only the first process's largest resident set is exact.
    """
    started = time.perf_counter()
    with output.open("ab") as stream:
        before = stream.tell()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, env=environment, start_new_session=True
        )
    usage, pid, due = Usage(), process.pid, None
    try:
        # WNOWAIT leaves the ended process, so that its counters can still be read.
        while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            usage = _with_memory(usage, pid)
            now = time.perf_counter()
            if kill is not None and due is None and _is_time(kill, output, before):
                due = now + kill.after_s
            if kill is not None and due is not None and now >= due and not usage.killed:
                os.killpg(pid, getattr(signal, f"SIG{kill.signal}"))
                usage = replace(usage, killed=True)
            time.sleep(INTERVAL_S)
        written = _written(pid)
    except BaseException:
        os.killpg(pid, signal.SIGKILL)
        process.wait()
        raise
    _, status, resources = os.wait4(pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)  # Popen must not wait for it again
    return replace(
        usage,
        exit_code=process.returncode,
        written=written,
        cpu_s=resources.ru_utime + resources.ru_stime,
        wall_s=time.perf_counter() - started,
    )


def tree(pid: int) -> list[int]:
    """A process and all its descendants."""
    found = [pid]
    for one in found:
        with suppress(OSError):
            for thread in os.listdir(f"/proc/{one}/task"):
                with suppress(OSError):
                    found += map(int, Path(f"/proc/{one}/task/{thread}/children").read_text().split())
    return found


def _with_memory(usage: Usage, pid: int) -> Usage:
    """The usage with the larger of its memory and that of this moment."""
    anonymous = resident = file = 0
    for one in tree(pid):
        status = ""
        with suppress(OSError):  # it has ended
            status = Path(f"/proc/{one}/status").read_text()
        values = {key: int(kilobytes) * 1024 for key, kilobytes in re.findall(r"^(\w+):\s+(\d+) kB$", status, re.M)}
        anonymous += values.get("RssAnon", 0) + values.get("RssShmem", 0)
        file += values.get("RssFile", 0)
        resident += values.get("VmRSS", 0)
        if one == pid and (peak := values.get("VmHWM", 0)) > usage.resident:
            usage = replace(usage, resident=peak, file=max(0, peak - values.get("RssAnon", 0)))
    usage = replace(usage, anonymous=max(usage.anonymous, anonymous))
    return replace(usage, resident=resident, file=file) if resident > usage.resident else usage


def _is_time(kill: Kill, output: Path, before: int) -> bool:
    """Whether all that the signal waits for is there. ``before``: where the command's text begins in ``output``."""
    if kill.exists and not any(Path(kill.exists).parent.glob(Path(kill.exists).name)):
        return False
    return not kill.says or re.search(kill.says.encode(), output.read_bytes()[before:]) is not None


def _written(pid: int) -> int:
    """Bytes that the process and its ended children gave to disks; zero where the system does not tell."""
    with suppress(OSError):
        if found := re.search(r"^write_bytes: (\d+)$", Path(f"/proc/{pid}/io").read_text(), re.M):
            return int(found[1])
    return 0
