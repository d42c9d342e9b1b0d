"""Listing what another process has open while that changes."""

from __future__ import annotations

import subprocess
import sys

from procfs import children, open_files

# Opens and closes files, and starts and ends threads and processes, as fast as it can.
RESTLESS = """
import subprocess, sys, threading
def churn():
    while True:
        for stream in [open("/dev/null") for _ in range(50)]:
            stream.close()
def breed():
    while True:
        thread = threading.Thread(target=subprocess.run, args=(["true"],))
        thread.start()
        thread.join()
for what in (churn, breed):
    threading.Thread(target=what, daemon=True).start()
print("busy", flush=True)
sys.stdin.read()
"""


def test_files_and_threads_that_end_meanwhile_are_left_out() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", RESTLESS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "busy\n"
        for _ in range(300):
            assert any("pipe:" in file for file in open_files(process.pid))
            children(process.pid)
        process.kill()
