"""Measure error and latency of each precision on every kernel class available on this machine (x86-64, Linux).

    python benchmarks/studies/kernel_classes.py OUT.json [--threads 1] [--rounds 31] [--work FOLDER] [--aarch64 FOLDER]

The policies are the reference policy and a decoder of 154 M parameters (decoder_speed.py) with int4 weights, in fp32,
int8, w4a8, int4a8 and int4. Besides the class of this processor, there are:

- masked: a copy of the engine whose `cpuid` instructions do not report some instruction sets (masked_cpuid.c). It runs
  the kernels of a lower class at the real speed of this processor. Needs a C compiler and objdump.
- emulated x86-64 with AVX2 only (QEMU): other instruction sets do not exist. Reference policy only, no latency.
- emulated 64-bit Arm, with FOLDER of scripts/aarch64_check.sh. Reference policy only, no latency.

The control is a product with signed weights that use all 8 bits: its result is wrong on kernels that saturate. Classes
that are not available are skipped.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import decoder_speed
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from rlrc import artifact as artifacts
from rlrc.artifact import GOLDEN, HistoryEntry
from rlrc.benchmarks.results import machine, results
from rlrc.compressor.stages import artifact_io
from rlrc.exporters.export import export
from rlrc.npz import read_npz
from rlrc.runtime.inference.backends.kernels import kernels

ROOT = Path(__file__).parents[2]
PRECISIONS = ("fp32", "int8", "w4a8", "int4a8", "int4")
HASWELL = "Haswell,-hle,-rtm,-invpcid,-pcid,-x2apic,-tsc-deadline"  # without features that QEMU does not support
CONTROL = """
import sys, numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
control = numpy.load(sys.argv[2])
y = session.run(None, {"x": control["x"]})[0]
print(float(numpy.abs(y - control["y"]).max() / numpy.abs(control["y"]).max()))
"""


def make(folder: Path) -> dict[str, list[Path]]:
    """Export both policies in every precision, unless the folder already contains them."""
    if not (folder / "int4").exists():
        decoder_speed.make(folder)
    if not (folder / "reference-dense").exists():
        parent = artifacts.load(ROOT / "reference/compressed")
        policy, arrays = artifact_io.load_policy(parent), read_npz(parent.file(GOLDEN))
        observations = {name: array for name, array in arrays.items() if name not in ("tokens", "logits", "actions")}
        with artifacts.create_artifact(folder / "reference-dense") as draft:
            draft.inherit(parent, "tokenizer")
            history = (HistoryEntry("new", {}, "0", None, 0.0),)
            artifact_io.write_policy(draft, policy, observations, history, exact=True)
    parents = {
        "reference": (ROOT / "reference/compressed", folder / "reference-dense"),
        "decoder": (folder / "int4", folder / "dense"),
    }
    exported: dict[str, list[Path]] = {}
    for policy_name, (int4, dense) in parents.items():
        for precision in PRECISIONS:
            out = folder / f"{policy_name}-{precision}"
            if not out.exists():
                print(f"exporting {out.name}", file=sys.stderr)
                weights = artifacts.load(dense if precision == "fp32" else int4, verify=())
                export(weights, out, precision=precision, tolerance=10.0)  # errors are reported here, not limited
            exported.setdefault(policy_name, []).append(out)
    return exported


def write_control(folder: Path) -> list[str]:
    """Write a product with signed 8-bit weights and its expected result. Returns the arguments that check it."""
    random = np.random.default_rng(0)
    x, weights = (
        random.uniform(0, 1, (8, 512)).astype(np.float32),
        random.integers(-127, 128, (512, 64)).astype(np.int8),
    )
    rounded = np.rint(x / (x.max() / np.float32(255))).astype(np.int64)
    y = (rounded @ weights.astype(np.int64)) * (x.max() / np.float32(255))
    np.savez(folder / "control.npz", x=x, y=y)
    constants: dict[str, NDArray[Any]] = {"w": weights, "scale": np.ones((), np.float32), "zero": np.zeros((), np.int8)}
    node = helper.make_node("DynamicQuantizeMatMul", ["x", *constants], ["y"], domain="com.microsoft")
    shapes = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (("x", [8, 512]), ("y", [8, 64]))
    ]
    tensors = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph([node], "control", shapes[:1], shapes[1:], tensors)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), folder / "control.onnx")
    return ["-c", CONTROL, str(folder / "control.onnx"), str(folder / "control.npz")]


def run(command: Sequence[str], environment: Mapping[str, str]) -> str:
    done = subprocess.run(command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--work", type=Path, help="folder that keeps artifacts and engine (default: a temporary one)")
    parser.add_argument("--aarch64", type=Path, help="folder of scripts/aarch64_check.sh")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.work or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        result = measure(folder, args.threads, args.rounds, args.aarch64)
    options = f"--threads {args.threads} --rounds {args.rounds}{' --aarch64 FOLDER' if args.aarch64 else ''}"
    result["command"] = f"python benchmarks/studies/kernel_classes.py {args.out.name} {options}"
    results.write(args.out, results.dump(result))
    print(table(result))
    return 0


def measure(folder: Path, threads: int, rounds: int, aarch64: Path | None) -> dict[str, Any]:
    sys.path.insert(0, str(ROOT / "scripts"))
    from masked_engine import MASKS, mask_variables, masked_engine

    policies, control, load = make(folder), write_control(folder), [round(os.getloadavg()[0], 2)]
    python, script = [sys.executable], str(ROOT / "benchmarks/studies/kernel_class.py")
    ways: list[tuple[str, str, list[str], dict[str, str]]] = [(kernels(), "this processor", python, {})]
    if kernels().startswith("x86-64 avx512") and shutil.which("cc") and shutil.which("objdump"):
        masked = masked_engine(folder)
        ways += [(name, "masked", python, masked | mask_variables(MASKS[name])) for name in MASKS if name != kernels()]
    qemu = shutil.which("qemu-x86_64-static")
    if qemu and kernels().startswith("x86-64"):
        ways.append(("x86-64 avx2", "emulated", [qemu, "-cpu", HASWELL, *python], {}))
    arm = shutil.which("qemu-aarch64-static")
    if arm and aarch64 is not None:
        emulator = [arm, "-L", str(aarch64 / "root"), "-E", f"PYTHONPATH={aarch64 / 'site'}:{ROOT / 'runtime'}"]
        ways.append(("aarch64", "emulated", [*emulator, str(aarch64 / "root/usr/bin/python3")], {}))
    rows, classes = [], []
    for name, way, command, environment in ways:
        print(f"{name}, {way}", file=sys.stderr)
        emulated = way == "emulated"
        error = float(run([*command, *control], environment))
        classes.append({"class": name, "way": way, "saturates": error > 0.01, "control_error": error})
        for policy, paths in policies.items():
            if emulated and policy != "reference":
                continue
            most = ["--most", "16"] if emulated else ["--threads", str(threads), "--rounds", str(rounds)]
            out = folder / "measured.json"
            print(run([*command, script, str(out), *map(str, paths), *most], environment), file=sys.stderr, end="")
            measured = json.loads(out.read_text())
            # kernels() asks the C library, which is not masked, so the class is set here.
            classes[-1]["versions"] = measured["versions"] | ({"kernels": name} if way == "masked" else {})
            for path, row in measured["rows"].items():
                precision = path.removeprefix(f"{policy}-")
                rows.append({"policy": policy, "class": name, "way": way, "precision": precision, **row})
    load.append(round(os.getloadavg()[0], 2))
    compare(rows)
    return {
        "kind": "kernel classes",
        "machine": machine.describe(threads),
        "load": load,
        "classes": classes,
        "rows": rows,
    }


def compare(rows: list[dict[str, Any]]) -> None:
    """Set ``other_tokens``: tokens that differ from this processor's; None if not all observations were replayed."""
    native = {(row["policy"], row["precision"]): row["answers"] for row in rows if row["way"] == "this processor"}
    for row in rows:
        expected, answers = native[row["policy"], row["precision"]], row["answers"]
        complete = len(expected) == len(answers)
        row["other_tokens"] = sum(a != b for a, b in zip(expected, answers, strict=True)) if complete else None
    for row in rows:
        del row["answers"]


def table(result: dict[str, Any]) -> str:
    lines = [
        "| policy | class | method | precision | logits error | wrong tokens | ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        ms = "not measured" if row["latency_ms"] is None else f"{row['latency_ms']['p50']} ({row['latency_ms']['p0']})"
        flips = f"{row['token_flips']} of {row['tokens']}"
        cells = [row["policy"], row["class"], row["way"], row["precision"], f"{row['logits_error']:.2%}", flips, ms]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
