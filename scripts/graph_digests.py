"""Print SHA-256 digests of all graphs exported from the reference policies and the golden checkpoints, as JSON lines.

    python scripts/graph_digests.py WORK > after.txt; diff before.txt after.txt

The digests show which graphs a change of the exporters affects. WORK is a folder for the artifacts.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
DATA = ROOT / "tests/data"
RLRC = [sys.executable, "-m", "rlrc.runtime.cli"]
FAMILIES = ("act", "openvla", "openvla-oft-l1", "openvla-oft-discrete", "pi0", "pi05", "smolvla")
TOKENIZERS = {"smolvla": "smolvla/tiny_smolvlm", "pi0": "pi0/tokenizer", "pi05": "pi05/tokenizer"}
IMAGES = {"openvla-oft-l1": "2", "openvla-oft-discrete": "1"}
FLOATS = {"onnx": ("fp32", "fp16", "int8"), "tensorrt": ("fp32", "fp16")}
INTEGERS = {"onnx": ("int4", "int4a8"), "tensorrt": ("int4",), "gguf": ("int4",)}


def rlrc(*arguments: object) -> str:
    """Run a command. Returns the last line of stderr if it fails, otherwise an empty string."""
    done = subprocess.run([*RLRC, *map(str, arguments)], capture_output=True, text=True, check=False)
    return done.stderr.strip().splitlines()[-1] if done.returncode else ""


def flags(family: str) -> list[object]:
    golden = json.loads((DATA / family / "golden.json").read_text())
    options: list[object] = ["--hints", DATA / family / "golden.json"]
    if key := golden["observations"][0].get("unnorm_key"):
        options += ["--unnorm-key", key]
    if family != "act":
        options += ["--tokenizer", DATA / TOKENIZERS.get(family, "openvla/checkpoint")]
    if family in IMAGES:
        options += ["--images", IMAGES[family]]
    return options


def artifacts(work: Path) -> Iterator[tuple[Path, Mapping[str, Sequence[str]]]]:
    """Artifacts with the precisions to export for each target."""
    yield ROOT / "reference/dense", FLOATS
    yield ROOT / "reference/compressed", INTEGERS
    for family in FAMILIES:
        out, checkpoint = work / family, DATA / family / "checkpoint"
        if not out.exists() and (error := rlrc("prune", checkpoint, out, "--lossless", *flags(family))):
            raise SystemExit(error)
        yield out, FLOATS


def main() -> None:
    work = Path(sys.argv[1])
    work.mkdir(parents=True, exist_ok=True)
    for artifact, precisions in artifacts(work):
        for target, precision in ((target, name) for target, names in precisions.items() for name in names):
            out = work / f"{artifact.name}-{target}-{precision}"
            refused = rlrc("export", artifact, out, "--to", target, "--precision", precision, "--tolerance", 100)
            files = sorted(path for path in (out / "graphs").rglob("*") if path.is_file() and target in path.parts)
            digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
            print(json.dumps({"export": out.name, **digests, "refused": refused}), flush=True)


if __name__ == "__main__":
    main()
