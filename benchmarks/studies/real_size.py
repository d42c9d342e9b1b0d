"""What each step of a compression needs on this machine with a checkpoint of real size.

    python benchmarks/studies/real_size.py folder openvla-7b OUT     an official folder with random bfloat16 weights
    python benchmarks/studies/real_size.py data openvla-7b OUT       a small LeRobotDataset that fits it
    python benchmarks/studies/real_size.py run openvla-7b --work DIR [--only STEP ...]

`run` takes the folder DIR/POLICY and the data set DIR/POLICY-data, and makes them if they are missing. It runs those
steps of real_size.toml whose output in DIR/POLICY-steps is missing, one alone at a time. Every step becomes a row of
benchmarks/results/real_size.json, with its limits; a step that runs again replaces its row. The exit code is 1 if one
fails or exceeds a limit. Let nothing else run beside it.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import string
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from measured import Kill, Usage, measure
from official_folder import POLICIES, describe, weight_bytes, write_folder
from small_dataset import write_dataset, write_observation

from rlrc.artifact import WEIGHTS, PolicySpec
from rlrc.benchmarks.results import machine
from rlrc.benchmarks.results.results import REAL_SIZE, dump
from rlrc.benchmarks.results.results import write as write_text
from rlrc.compressor.checkpoints import reader
from rlrc.errors import UserError
from rlrc.folders import sha256
from rlrc.strict import parse, read_toml

STUDIES = Path(__file__).resolve().parent
PLAN = STUDIES / "real_size.toml"
RECIPE = STUDIES / "real_size_recipe.toml"
RESULTS = STUDIES.parent / "results/real_size.json"
GB = 1e9
PREDICTED = 1.15  # times, at most, that the predicted and the measured memory differ
Row = dict[str, Any]


@dataclass(frozen=True)
class Step:
    """A command of rlrc. Limits are None where nothing is promised."""

    name: str
    command: tuple[str, ...]
    output: str = ""
    """name of the file or folder that it writes; a step without one leaves NAME.done when it succeeds"""
    anonymous_gb: float | None = None
    cpu_minutes: float | None = None
    resident_to_weights: float | None = None
    """of the largest resident set to the bytes of the official folder's safetensors"""
    kills: tuple[Kill, ...] = ()
    """interruptions, each of another run of the command; after them it runs to its end"""
    same_weights_as: str = ""
    """step whose weights must be the same, bit for bit"""
    must_say: str = ""
    """pattern that what the command prints must contain"""
    only: tuple[str, ...] = ()
    """policies that have this step; empty: all"""


@dataclass(frozen=True)
class Plan:
    flags: dict[str, tuple[str, ...]]
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Study:
    """One policy's chain: where its inputs are, and where the steps' outputs go."""

    policy: str
    plan: Plan
    folder: Path
    data: Path
    work: Path
    results: Path = RESULTS
    program: tuple[str, ...] = (sys.executable, "-m", "rlrc.runtime.cli")

    @property
    def steps(self) -> list[Step]:
        return [step for step in self.plan.steps if not step.only or self.policy in step.only]

    def output(self, step: Step) -> Path:
        return self.work / (step.output or f"{step.name}.done")

    def places(self, step: Step) -> dict[str, str]:
        """What the words in braces stand for."""
        out = self.output(step)
        places: dict[str, Path] = {other.name: self.output(other) for other in self.steps}
        places |= {"folder": self.folder, "data": self.data, "recipe": RECIPE, "out": out}
        places |= {"observation": self.work / "observation.npz", "run": out.parent / f".{out.name}.run"}
        places |= {"partial": out.parent / f".{out.name}.partial-*"}
        return {name: str(place) for name, place in places.items()}

    def arguments(self, step: Step) -> list[str]:
        found: list[str] = []
        for word in step.command:
            found += self.plan.flags[self.policy] if word == "{flags}" else [word.format_map(self.places(step))]
        return found

    def missing(self, step: Step) -> list[str]:
        """Earlier steps whose output this one needs and does not find."""
        named = {name for word in step.command for _, name, _, _ in string.Formatter().parse(word) if name}
        named |= {step.same_weights_as}
        return [other.name for other in self.steps if other.name in named and not self.output(other).exists()]

    def kills(self, step: Step) -> list[Kill]:
        """The step's interruptions with their places filled in."""
        places = self.places(step)
        return [replace(kill, exists=kill.exists.format_map(places)) for kill in step.kills]

    def log(self, text: str) -> None:
        line = f"{time.strftime('%H:%M:%S')} {self.policy} {text}"
        print(line, flush=True)
        with (self.work / "log.txt").open("a") as stream:
            stream.write(line + "\n")


def run_study(study: Study, only: Sequence[str] = (), again: bool = False) -> bool:
    """Run the steps whose output is missing, or with ``again`` those of ``only`` anew. -> whether all hold.

    Raises UserError for a step in ``only`` that the policy does not have.
    """
    names = [step.name for step in study.steps]
    if unknown := set(only) - set(names):
        raise UserError(f"expected steps of {', '.join(names)}, found {min(unknown)}; name others with --only")
    study.work.mkdir(parents=True, exist_ok=True)
    good = True
    for step in study.steps:
        if only and step.name not in only:
            continue
        out = study.output(step)
        if again and only:
            shutil.rmtree(out) if out.is_dir() else out.unlink(missing_ok=True)
        if out.exists():
            study.log(f"{step.name}: there already")
            continue
        if missing := study.missing(step):
            study.log(f"{step.name}: left out, without the output of {', '.join(missing)}")
            good = False
            continue
        row = run_step(study, step)
        record(study.results, row)
        good &= row["verdict"] == "PASS"
    return good


def run_step(study: Study, step: Step) -> Row:
    """Run one step to its end and measure it. -> its row."""
    study.log(f"{step.name}: starts")
    arguments, load = study.arguments(step), os.getloadavg()[0]
    log = study.work / f"{step.name}.log"
    log.unlink(missing_ok=True)
    usage, interruptions = Usage(), 0
    for kill in (*study.kills(step), None):
        usage += (part := measure([*study.program, *arguments], log, kill=kill))
        study.log(f"{step.name}: exit code {part.exit_code} after {part.wall_s:.1f} s")
        if not part.killed or study.output(step).exists():
            break  # it ended before it could be interrupted
        interruptions += 1
    row: Row = {
        "name": f"{study.policy} {step.name}",
        "policy": study.policy,
        "step": step.name,
        "command": machine.command(arguments),
        "commit": commit(),
        "load": round(load, 2),
        "exit_code": usage.exit_code,
        "anonymous_gb": round(usage.anonymous / GB, 3),
        "resident_gb": round(usage.resident / GB, 3),
        "file_backed_gb": round(usage.file / GB, 3),
        "weights_gb": round(weight_bytes([study.folder]) / GB, 3),
        "written_gb": round(usage.written / GB, 3),
        "cpu_minutes": round(usage.cpu_s / 60, 3),
        "wall_minutes": round(usage.wall_s / 60, 3),
        "interruptions": interruptions,
    }
    limits = ("anonymous_gb", "cpu_minutes", "resident_to_weights")
    if found := re.search(r"needs about ([\d.]+) GB of memory", log.read_text(errors="replace")):
        row["predicted_gb"] = float(found[1])
    row["limits"] = {name: value for name in limits if (value := getattr(step, name)) is not None}
    reasons = find_failures(study, step, row, log)
    row["verdict"] = "FAIL" if reasons else "PASS"
    row["reasons"] = reasons
    if not reasons and not step.output:
        study.output(step).touch()
    study.log(
        f"{step.name}: {row['verdict']}, {row['anonymous_gb']:.2f} GB anonymous, {row['resident_gb']:.2f} GB resident, "
        f"{row['cpu_minutes']:.2f} CPU-minutes" + "".join(f"; {reason}" for reason in reasons)
    )
    return row


def find_failures(study: Study, step: Step, row: Row, log: Path) -> list[str]:
    """A line for each reason why the step does not hold."""
    found, limits, said = [], row["limits"], log.read_text(errors="replace")
    if row["exit_code"] != 0:
        last = next((line for line in reversed(said.splitlines()) if line.strip()), "it printed nothing")
        for path in (study.work, study.folder.parent, study.data.parent, STUDIES):
            last = last.replace(f"{path}/", "")
        found.append(f"exit code {row['exit_code']}: {last}")
    for name in ("anonymous_gb", "cpu_minutes"):
        if name in limits and row[name] > limits[name]:
            found.append(f"{name} {row[name]} is more than {limits[name]}")
    if "resident_to_weights" in limits:
        times = row["resident_gb"] / row["weights_gb"]
        if times > limits["resident_to_weights"]:
            found.append(f"resident {times:.2f} times the stored weights is more than {limits['resident_to_weights']}")
    if "predicted_gb" in row and not 1 / PREDICTED < row["predicted_gb"] / row["anonymous_gb"] < PREDICTED:
        found.append(f"predicted {row['predicted_gb']} GB of memory, measured {row['anonymous_gb']}")
    if row["interruptions"] != len(step.kills):
        found.append(f"interrupted {row['interruptions']} times instead of {len(step.kills)}")
    if step.must_say and not re.search(step.must_say, said):
        found.append(f"it never said {step.must_say!r}")
    if step.same_weights_as and not row["exit_code"]:
        other = next(one for one in study.steps if one.name == step.same_weights_as)
        weights = digest_weights(study.output(other))
        if not weights:
            found.append(f"no weights of {other.name} to compare with")
        elif digest_weights(study.output(step)) != weights:
            found.append(f"other weights than {other.name}")
    return found


def digest_weights(artifact: Path) -> dict[str, str]:
    """Digests of the files with the weights."""
    return {file.name: sha256(file) for file in (artifact / WEIGHTS).parent.glob("*.safetensors")}


def record(results: Path, row: Row) -> None:
    """Put the row into the file in place of the former one of its name, or behind all; it is never half written."""
    rows: list[Row] = []
    if results.exists():
        rows = parse(results.read_bytes())["rows"]
    names = [one["name"] for one in rows]
    if row["name"] in names:
        rows[names.index(row["name"])] = row
    else:
        rows.append(row)
    command = "python benchmarks/studies/real_size.py run POLICY --work DIR"
    write_text(results, dump({"kind": REAL_SIZE, "command": command, "machine": machine.describe(), "rows": rows}))


def commit() -> str:
    """The commit of the sources, with a + if they are changed; "" outside of a repository."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", STUDIES, *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":!benchmarks/results")
    return git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")


def spec_of(policy: str, tiny: bool = False) -> PolicySpec:
    return reader.layout(*describe(policy, tiny)).spec


def prepare(study: Study, tiny: bool = False) -> None:
    """Make what is missing of the folder, the data set and the observation."""
    study.work.mkdir(parents=True, exist_ok=True)
    if not study.folder.exists():
        study.log("writes the folder")
        write_folder(study.policy, study.folder, tiny)
    if not study.data.exists():
        write_dataset(spec_of(study.policy, tiny), study.data)
    observation = study.work / "observation.npz"
    if not observation.exists():
        write_observation(spec_of(study.policy, tiny), observation)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="action", required=True)
    for name, text in (("folder", "write an official folder"), ("data", "write a small data set"), ("run", "measure")):
        command = commands.add_parser(name, help=text)
        command.add_argument("policy", choices=POLICIES)
        command.add_argument("--tiny", action="store_true", help="in dimensions that take seconds")
        if name == "run":
            command.add_argument("--work", type=Path, required=True)
            command.add_argument("--folder", type=Path)
            command.add_argument("--data", type=Path)
            command.add_argument("--results", type=Path, default=RESULTS)
            command.add_argument("--only", nargs="+", default=[], metavar="STEP")
            command.add_argument("--again", action="store_true", help="also those of --only whose output is there")
        else:
            command.add_argument("out", type=Path)
    given = parser.parse_args(arguments)
    try:
        return run_command(given)
    except UserError as error:
        print(f"real_size: {error}", file=sys.stderr)
        return 2


def run_command(given: argparse.Namespace) -> int:
    if given.action == "folder":
        write_folder(given.policy, given.out, given.tiny)
        return 0
    if given.action == "data":
        write_dataset(spec_of(given.policy, given.tiny), given.out)
        return 0
    work = given.work.resolve()
    folder = (given.folder or work / given.policy).resolve()
    data = (given.data or work / f"{given.policy}-data").resolve()
    plan = read_toml(Plan, PLAN)
    if given.tiny:
        # The libraries alone take more than 1.6 times tiny weights, and tiny training ends before it reports steps.
        steps = [step for step in plan.steps if not any(kill.says for kill in step.kills)]
        plan = replace(plan, steps=tuple(replace(step, resident_to_weights=None) for step in steps))
    study = Study(given.policy, plan, folder, data, work / f"{given.policy}-steps", given.results)
    prepare(study, given.tiny)
    return 0 if run_study(study, given.only, given.again) else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that the measured command ends as well
    signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background and their commands ignore it
    sys.exit(main())
