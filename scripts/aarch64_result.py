"""Join the results of replay.py on two machines. Exit code 1 if an artifact exceeds its limits.

    python scripts/aarch64_result.py COMMAND X86_64 AARCH64 EMULATOR RESOLVED OUT

RESOLVED: a JSON file with the resolved package versions, or "none".
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from rlrc.benchmarks.results import results

KEPT = ("max_error", "range_error", "token_flips", "gripper_flips")


def row(arm: dict[str, Any], x86: dict[str, Any]) -> dict[str, Any]:
    record = arm["record"]
    return {
        "name": arm["name"],
        "precision": arm["precision"],
        "observations": arm["observations"],
        "golden_observations": arm["of"],
        "tolerance": record["tolerance"],
        "range_tolerance": record["range_tolerance"],
        "x86_64": {key: x86["record"][key] for key in KEPT},
        "aarch64": {key: record[key] for key in KEPT},
        "difference": {key: value for key, value in arm["difference"].items() if key != "failure"},
    }


def main(command: str, native: str, emulated: str, emulator: str, resolved: str, out: str) -> int:
    x86, arm = (json.loads(Path(folder, "replay.json").read_text()) for folder in (native, emulated))
    pairs = list(zip(arm["rows"], x86["rows"], strict=True))
    result = {
        "kind": "aarch64",
        "command": f"RLRC_MOST={most} {command}" if (most := os.environ.get("RLRC_MOST")) else command,
        "emulator": emulator,
        "python": {"x86_64": x86["python"], "aarch64": arm["python"]},
        "versions": pairs[0][0]["record"]["versions"],
        "resolved": None if resolved == "none" else json.loads(Path(resolved).read_text()),
        "rows": [row(*pair) for pair in pairs],
    }
    results.write(Path(out), results.dump(result))
    failures = [
        f"{one['name']} on {machine}: {reason}"
        for pair in pairs
        for machine, one, reason in (
            ("aarch64", pair[0], pair[0]["failure"]),
            ("aarch64 against x86-64", pair[0], pair[0]["difference"]["failure"]),
            ("x86-64", pair[1], pair[1]["failure"]),
        )
        if reason
    ]
    for failure in failures:
        print(f"aarch64: check failed: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
