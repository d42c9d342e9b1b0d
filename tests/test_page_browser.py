"""The operator's page in a real headless Chromium, on a loop that moves an arm: `make page-check`."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from driven import Running
from serving import Served

from rlrc.runtime.inference.decode import NoAction
from rlrc.runtime.servers.client import RemotePolicy

PYTHON = os.environ.get("RLRC_PAGE_PYTHON")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PERIOD_S = 0.05
DELIVERED_S = 0.15  # a busy machine's browser, two processes and the network between them

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium in PATH; make page-check installs it"),
    pytest.mark.skipif(PYTHON is None, reason="RLRC_PAGE_PYTHON: a Python with playwright; make page-check has one"),
]


def visited(kind: str, link: str, folder: Path) -> dict[str, Any]:
    """What the browser tells, without complaints of its console and serious findings of axe-core."""
    pictures = os.environ.get("RLRC_PAGE_PICTURES", str(folder))
    command = [str(PYTHON), str(Path(__file__).with_name("browser.py")), kind, link, str(CHROMIUM), pictures]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    assert told["errors"] == []
    assert told["serious"] == {}
    assert told["moves"]  # the chart
    assert told["wide"] <= 0  # nothing to scroll sideways on a phone
    return told


def test_an_operator_stops_and_re_arms_a_loop(arm_toy: Path, tmp_path: Path) -> None:
    running = Running(arm_toy, tmp_path, "--port", "0", "--rearm")
    assert running.process.stdout is not None
    try:
        told = visited("run", running.process.stdout.readline().split()[1], tmp_path)
    finally:
        running.process.send_signal(signal.SIGTERM)
        _, rows = running.end()
    stopped = next(row for row in rows if row["stopped"])
    before = rows[rows.index(stopped) - 1]
    assert stopped["held"]
    assert before["sent"] < told["pressed"] + DELIVERED_S
    assert told["pressed"] < stopped["sent"] < told["pressed"] + PERIOD_S + DELIVERED_S
    print(f"from the press to the hold: {(stopped['sent'] - told['pressed']) * 1e3:.1f} ms at 20 Hz")
    assert [False, 200] in told["stops"]  # by the stop's own port, which is asked again and again
    assert [True, 200] in told["stops"]  # and by the page's
    assert told["tapped"] == "Stopped"  # a tap re-arms nothing
    assert told["bench"].startswith("p50")
    again = next(row for row in rows if row["sent"] > stopped["sent"] and not row["stopped"])
    assert again["sent"] < told["rearmed"]
    assert not again["held"]
    assert any("rearm: the page (the browser)" in event for event in told["events"])


def test_an_operator_stops_and_re_arms_a_server(arm_toy: Path, tmp_path: Path) -> None:
    profile = str(Path(__file__).parents[1] / "examples/udp_arm.toml")
    with Served(arm_toy, "--page", "0", "--profile", profile, "--hz", "20") as served:
        over = threading.Event()
        client = threading.Thread(target=asking, args=(served.ports["openpi"], over))
        client.start()
        try:
            visited("serve", str(served.page), tmp_path)
        finally:
            over.set()
            client.join()


def asking(port: int, over: threading.Event) -> None:
    """A robot that asks ten times a second, and does not mind refusals."""
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    observation = {"image.corner4": picture, "state": np.zeros(2, np.float32), "instruction": "open the drawer"}
    with RemotePolicy(f"ws://127.0.0.1:{port}", timeout_s=20) as policy:
        while not over.wait(0.1):
            with suppress(NoAction):
                policy.infer(observation)
