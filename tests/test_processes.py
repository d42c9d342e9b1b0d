"""Worker processes: every result comes back, and whatever goes wrong ends the run at once and leaves none behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from rlrc.errors import UserError
from rlrc.processes import WorkerPool, ask


def pid_of(_: Any) -> int:
    return os.getpid()


def divide(number: int) -> float:
    if number < 0:
        raise UserError(f"expected a number from 0 on, found {number}")
    return 1 / number


def closure(_: Any) -> Any:
    return lambda: None  # cannot be pickled


def die_at_zero(seconds: float) -> None:
    if seconds == 0:
        os._exit(3)
    time.sleep(seconds)


def alive(pid: int) -> bool:
    """A process that ended and was waited for is gone; a zombie counts as ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def pids(workers: WorkerPool) -> list[int]:
    return [process.pid for process in workers.processes.values() if process.pid is not None]


def test_every_result_comes_back() -> None:
    with WorkerPool(2) as workers:
        assert sorted(workers.run(abs, [-3, -1, -2])) == [(-3, 3), (-2, 2), (-1, 1)]
        assert list(workers.run(abs, [])) == []


def test_processes_are_kept_between_calls_and_no_more_than_needed() -> None:
    with WorkerPool(2) as workers:
        assert workers.processes == {}
        first = list(workers.run(pid_of, [0]))
        assert [(0, pid) for pid in pids(workers)] == first
        assert {pid for _, pid in workers.run(pid_of, list(range(20)))} <= set(pids(workers))
        assert first[0][1] in pids(workers)
        assert len(pids(workers)) == 2
        kept = pids(workers)
    assert not any(map(alive, kept))


def test_a_worker_that_dies_is_one_line() -> None:
    with WorkerPool(2) as workers:
        pair = [pid for _, pid in workers.run(pid_of, [0, 1, 2, 3])]
        with pytest.raises(UserError, match=r"one ended by exit code 3; .* pass fewer --workers") as error:
            list(workers.run(die_at_zero, [60.0, 0.0]))
        assert "\n" not in str(error.value)
        assert not any(map(alive, pair))  # nor is the other one waited for


def test_a_worker_that_was_killed_is_one_line() -> None:
    with WorkerPool(1) as workers:
        (pid,) = [pid for _, pid in workers.run(pid_of, [0])]
        threading.Timer(0.5, os.kill, (pid, signal.SIGKILL)).start()
        with pytest.raises(UserError, match="one ended by SIGKILL; it may have run out of memory"):
            list(workers.run(time.sleep, [60.0]))


def test_silence_is_one_line_and_is_not_waited_for() -> None:
    began = time.monotonic()
    with WorkerPool(1) as workers:
        (pid,) = [pid for _, pid in workers.run(pid_of, [0])]
        with pytest.raises(UserError, match=r"report within 0\.5 s, found none .* pass fewer --workers") as error:
            list(workers.run(time.sleep, [60.0], silence_s=0.5))
    assert "\n" not in str(error.value)
    assert time.monotonic() - began < 15
    assert not alive(pid)


def test_a_bug_keeps_its_traceback() -> None:
    with WorkerPool(1) as workers:
        with pytest.raises(
            RuntimeError, match=r"(?s)a worker failed:\nTraceback .*in divide\n.*ZeroDivisionError"
        ) as e:
            list(workers.run(divide, [0]))
        assert not isinstance(e.value, UserError)
        with pytest.raises(RuntimeError, match=r"(?s)a worker failed:.*pickle"):
            list(workers.run(closure, [0]))
        assert list(workers.run(divide, [2])) == [(2, 0.5)]  # new processes after an error


def test_an_error_of_the_user_stays_one() -> None:
    with WorkerPool(1) as workers, pytest.raises(UserError, match=r"^expected a number from 0 on, found -1$"):
        list(workers.run(divide, [-1]))
    with pytest.raises(UserError, match="at least one worker, found 0"):
        WorkerPool(0)


def test_results_that_nobody_wants_do_not_answer_the_next_call() -> None:
    with WorkerPool(2) as workers:
        for _ in workers.run(time.sleep, [0.0, 60.0]):
            break
        assert list(workers.run(abs, [-5])) == [(-5, 5)]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems cannot tie a process to its parent")
def test_workers_die_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    program = tmp_path / "parent.py"
    program.write_text(
        "import os, time\n"
        "from rlrc.processes import WorkerPool\n"
        "def pid_of(_): return os.getpid()\n"
        "if __name__ == '__main__':\n"
        "    with WorkerPool(1) as workers:\n"
        "        print(*[pid for _, pid in workers.run(pid_of, [0])], flush=True)\n"
        "        list(workers.run(time.sleep, [60.0]))\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, program], env=environment, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        time.sleep(0.2)  # it sleeps by now, and would for a minute
        assert alive(worker)
        parent.kill()
    deadline = time.monotonic() + 5
    while alive(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(worker)


def ask_thrice(number: int) -> list[int]:
    return [ask((number, i)) for i in range(number)]


def test_jobs_ask_and_are_answered_together() -> None:
    """Three jobs in two processes: whoever runs has asked before anyone is answered."""
    together = list[list[tuple[int, int]]]()

    def answer(questions: list[tuple[int, int]]) -> list[int]:
        together.append(questions)
        return [10 * number + i for number, i in questions]

    with WorkerPool(2) as workers:
        found = dict(workers.run(ask_thrice, [3, 1, 2], answer=answer))
    assert found == {1: [10], 2: [20, 21], 3: [30, 31, 32]}
    assert together == [[(3, 0), (1, 0)], [(3, 1), (2, 0)], [(3, 2), (2, 1)]]


def test_a_job_that_dies_while_another_waits_for_its_answer() -> None:
    with WorkerPool(2) as workers, pytest.raises(UserError, match="one ended by exit code 3"):
        list(workers.run(ask_or_die, [1, 0], answer=lambda questions: questions))
    assert workers.processes == {}


def ask_or_die(number: int) -> int:
    if number == 0:
        time.sleep(0.5)
        os._exit(3)
    found: int = ask(number)
    return found
