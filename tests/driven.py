"""`rlrc run` on the rig's arm in a process of its own, as an operator starts it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
PROFILE = Path(__file__).parents[1] / "examples/udp_arm.toml"
DRIVER = """
from rlrc.benchmarks.control.simulated_arm import SimulatedArm

class Told(SimulatedArm):
    def sense(self):
        sensed = super().sense()
        return sensed._replace(observation={**sensed.observation, "instruction": "wave"})

def open_robot(spec, instruction):
    return Told((32, 32), ("corner4",))
"""


class Running:
    """`rlrc run` at 20 Hz; lenient about time, since the machine is shared."""

    def __init__(
        self,
        artifact: Path,
        folder: Path,
        *options: str,
        keyboard: int = subprocess.DEVNULL,
        driver: str = DRIVER,
        variables: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        (folder / "rig_driver.py").write_text(driver)
        self.log = folder / "log.jsonl"
        command = [sys.executable, "-m", "rlrc.runtime.cli", "run", str(artifact), "--driver", "rig_driver:open_robot"]
        command += ["--profile", str(PROFILE), "--hz", "20", "--late", "6", "--patience", "5"]
        self.process = subprocess.Popen(
            [*command, "--log", str(self.log), *options],
            cwd=folder,
            env=ENVIRONMENT | variables,
            stdin=keyboard,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        self.sources = self.process.stdout.readline()
        assert self.sources.startswith("inference:"), self.process.communicate()
        time.sleep(1)  # it moves

    def end(self) -> tuple[str, list[dict[str, Any]]]:
        """What it has printed, and the log."""
        printed, complaints = self.process.communicate(timeout=60)
        assert self.process.returncode == 0, complaints
        assert complaints == ""
        return printed, [json.loads(line) for line in self.log.read_text().splitlines()]
