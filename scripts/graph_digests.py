"""SHA-256 of every graph that is exported from reference/dense and the seven tiny checkpoints, as JSON lines.

    python scripts/graph_digests.py WORK > after.txt; diff before.txt after.txt

What a change of the exporters must not change is the same before and after. WORK is a folder for the artifacts.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
DATA = ROOT / "tests/data"
RLRC = [sys.executable, "-m", "rlrc.runtime.cli"]
FAMILIES = ("act", "openvla", "openvla-oft-l1", "openvla-oft-discrete", "pi0", "pi05", "smolvla")
TOKENIZERS = {"smolvla": "smolvla/tiny_smolvlm", "pi0": "pi0/tokenizer", "pi05": "pi05/tokenizer"}
IMAGES = {"openvla-oft-l1": "2", "openvla-oft-discrete": "1"}
PRECISIONS = {"onnx": ("fp32", "fp16", "int8"), "tensorrt": ("fp32", "fp16")}


def rlrc(*arguments: object) -> str:
    """-> the last line of stderr where the command refuses, else nothing."""
    done = subprocess.run([*RLRC, *map(str, arguments)], capture_output=True, text=True, check=False)
    return done.stderr.strip().splitlines()[-1] if done.returncode else ""


def flags(family: str) -> list[object]:
    golden = json.loads((DATA / family / "golden.json").read_text())
    given: list[object] = ["--hints", DATA / family / "golden.json"]
    if key := golden["observations"][0].get("unnorm_key"):
        given += ["--unnorm-key", key]
    if family != "act":
        given += ["--tokenizer", DATA / TOKENIZERS.get(family, "openvla/checkpoint")]
    if family in IMAGES:
        given += ["--images", IMAGES[family]]
    return given


def artifacts(work: Path) -> list[Path]:
    found = [ROOT / "reference/dense"]
    for family in FAMILIES:
        out = work / family
        if not out.exists() and (refusal := rlrc("prune", DATA / family / "checkpoint", out, "--lossless", *flags(family))):
            raise SystemExit(refusal)
        found.append(out)
    return found


def main() -> None:
    work = Path(sys.argv[1])
    work.mkdir(parents=True, exist_ok=True)
    for artifact in artifacts(work):
        for target, precisions in PRECISIONS.items():
            for precision in precisions:
                out = work / f"{artifact.name}-{target}-{precision}"
                refusal = rlrc("export", artifact, out, "--to", target, "--precision", precision, "--tolerance", 100)
                graphs = sorted(path for path in out.rglob("graphs/**/*") if path.is_file())
                digests = {path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in graphs}
                print(json.dumps({"artifact": artifact.name, "target": target, "precision": precision, **digests, "refused": refusal}))


if __name__ == "__main__":
    main()
