"""The operator's page in a real headless Chromium, on a loop that moves an arm: `make page-check`."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from driven import Running

PYTHON = os.environ.get("RLRC_PAGE_PYTHON")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PERIOD_S = 0.05
DELIVERED_S = 0.15  # a busy machine's browser, two processes and the network between them

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium in PATH; make page-check installs it"),
    pytest.mark.skipif(PYTHON is None, reason="RLRC_PAGE_PYTHON: a Python with playwright; make page-check has one"),
]


def test_an_operator_stops_and_re_arms(arm_toy: Path, tmp_path: Path) -> None:
    running = Running(arm_toy, tmp_path, "--port", "0", "--rearm")
    assert running.process.stdout is not None
    link = running.process.stdout.readline().split()[1]
    pictures = Path(os.environ.get("RLRC_PAGE_PICTURES", tmp_path))
    command = [str(PYTHON), str(Path(__file__).with_name("browser.py")), link, str(CHROMIUM), str(pictures)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    running.process.send_signal(signal.SIGTERM)
    _, rows = running.end()
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    print(json.dumps({name: value for name, value in told.items() if name != "events"}))
    assert told["errors"] == []
    assert told["serious"] == {}
    assert told["moves"]
    assert told["wide"] <= 0  # nothing to scroll sideways on a phone

    stopped = next(row for row in rows if row["stopped"])
    before = rows[rows.index(stopped) - 1]
    assert stopped["held"]
    assert before["sent"] < told["pressed"] + DELIVERED_S
    assert told["pressed"] < stopped["sent"] < told["pressed"] + PERIOD_S + DELIVERED_S
    print(f"from the press to the hold: {(stopped['sent'] - told['pressed']) * 1e3:.1f} ms at 20 Hz")
    assert told["tapped"] == "Stopped"  # a tap re-arms nothing
    assert told["bench"].startswith("p50")
    again = next(row for row in rows if row["sent"] > stopped["sent"] and not row["stopped"])
    assert again["sent"] < told["rearmed"]
    assert not again["held"]
    assert any("rearm: the page (the browser)" in event for event in told["events"])
