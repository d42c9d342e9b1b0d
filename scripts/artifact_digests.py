"""Print SHA-256 digests of what every stage makes of the reference policies and the golden checkpoints, as JSON lines.

    python scripts/artifact_digests.py WORK [--only stages|graphs] > after.txt; diff before.txt after.txt

The digests show what a change of the stages or the exporters affects, on one machine. WORK is a folder for the
artifacts; WORK/data has a LeRobotDataset for each family, which the script writes unless it is there.
"""

from __future__ import annotations

import argparse
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
SCHEDULE = ("--schedule", "linear", "--decay", "0.45", "--weight-decay", "0.02")
TRAINING = ("--steps", "3", "--batch", "4", "--rate", "1e-3", "--warmup", "0", "--precision", "float32", *SCHEDULE)
# Stages of a checkpoint: the data set comes with {data}. Stages of its lossless artifact: below.
OF_FOLDERS = {
    "lossless": ("prune", "--lossless"),
    "magnitude": ("prune", "--ratio", "0.5", "--score", "magnitude"),
    "random": ("prune", "--ratio", "0.5", "--score", "random"),
    "wanda": ("prune", "--ratio", "0.5", "--score", "wanda", "--data", "{data}", "--batch", "2", "--batches", "2"),
    "taylor": ("prune", "--ratio", "0.5", "--score", "taylor", "--data", "{data}", "--batch", "2", "--batches", "2"),
    "folder-int4": ("quantize",),
}
OF_ARTIFACTS = {
    "rtn": ("quantize",),
    "awq": ("quantize", "--method", "awq"),
    "gptq": ("quantize", "--method", "gptq"),
    "budget": ("quantize", "--budget", "0.1"),
    "sft": ("sft", "--data", "{data}", "--lora", "0", *TRAINING),
    "sft-lora": ("sft", "--data", "{data}", "--lora", "2", *TRAINING),
}


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


def data_of(family: str, work: Path) -> Path:
    """A small LeRobotDataset that fits the family's golden checkpoint."""
    out = work / "data" / family
    if not out.exists():
        sys.path[:0] = [str(ROOT / "benchmarks/studies"), str(ROOT / "tests")]
        from small_dataset import write_dataset

        from families import source_of

        out.parent.mkdir(parents=True, exist_ok=True)
        write_dataset(source_of(family).spec, out)
    return out


def digests(folder: Path) -> dict[str, str]:
    """Of every file but the manifest, which has times, and the curves."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json")
    kept = [path for path in files if "curves" not in path.parts]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in kept}


def stages(work: Path) -> Iterator[tuple[str, Path, str]]:
    """Every stage of every family: its name, its output and what it refused."""
    for family in FAMILIES:
        data, checkpoint = data_of(family, work), DATA / family / "checkpoint"
        lossless = work / f"{family}-lossless"
        for name, (command, *options) in (OF_FOLDERS | OF_ARTIFACTS).items():
            out = work / f"{family}-{name}"
            source, own = (checkpoint, flags(family)) if name in OF_FOLDERS else (lossless, [])
            given = [option.format(data=data) for option in options]
            yield out.name, out, "" if out.exists() else rlrc(command, source, out, *given, *own)
        out = work / f"{family}-written-back"
        refused = "" if out.exists() else rlrc("write-back", lossless, out, "--like", checkpoint, *flags(family))
        yield out.name, out, refused


def artifacts(work: Path) -> Iterator[tuple[Path, Mapping[str, Sequence[str]]]]:
    """Artifacts with the precisions to export for each target."""
    yield ROOT / "reference/dense", FLOATS
    yield ROOT / "reference/compressed", INTEGERS
    for family in FAMILIES:
        out, checkpoint = work / f"{family}-lossless", DATA / family / "checkpoint"
        if not out.exists() and (error := rlrc("prune", checkpoint, out, "--lossless", *flags(family))):
            raise SystemExit(error)
        yield out, FLOATS


def graphs(work: Path) -> Iterator[tuple[str, Path, str]]:
    """Every export: its name, the folder of its graphs and what it refused."""
    for artifact, precisions in artifacts(work):
        for target, precision in ((target, name) for target, names in precisions.items() for name in names):
            out = work / f"{artifact.name}-{target}-{precision}"
            refused = rlrc("export", artifact, out, "--to", target, "--precision", precision, "--tolerance", 100)
            yield out.name, out / "graphs" / target, refused


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--only", choices=("stages", "graphs"))
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    for part in (stages, graphs):
        if given.only in (None, part.__name__):
            for name, folder, refused in part(given.work):
                print(json.dumps({"name": name, **digests(folder), "refused": refused}), flush=True)


if __name__ == "__main__":
    main()
