"""Golden folders, copied and changed, and the spec and the actions that come of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from families import DATA, flags
from rlrc.artifact import PolicySpec
from rlrc.compressor.checkpoints import reader
from rlrc.compressor.checkpoints.folder import open_folder, options_of
from rlrc.compressor.checkpoints.layout import Layout
from rlrc.runtime.cli import main

PRE, POST = "policy_preprocessor.json", "policy_postprocessor.json"
NORMALIZER, UNNORMALIZER = "normalizer_processor", "unnormalizer_processor"
Change = Callable[[Path], None]


def copied(family: str, path: Path, *changes: Change) -> Path:
    folder = shutil.copytree(DATA / family / "checkpoint", path / f"{family}-changed")
    for change in changes:
        change(folder)
    return folder


def edited(file: str, change: Callable[[Any], object]) -> Change:
    def run(folder: Path) -> None:
        values = json.loads((folder / file).read_text())
        change(values)
        (folder / file).write_text(json.dumps(values))

    return run


def step(values: Any, name: str) -> Any:
    return next(one for one in values["steps"] if one["registry_name"] == name)


def setting(file: str, name: str, **settings: Any) -> Change:
    return edited(file, lambda values: step(values, name)["config"].update(settings))


def without(file: str, name: str) -> Change:
    return edited(file, lambda values: values["steps"].remove(step(values, name)))


def state_file(folder: Path, file: str, name: str) -> Path:
    return folder / step(json.loads((folder / file).read_text()), name)["state_file"]


def given(family: str) -> list[str]:
    known = flags(family)
    return ["--hints", str(known.hints), *(["--tokenizer", str(known.tokenizer)] if known.tokenizer else [])]


def infer(folder: Path, family: str, out: Path, *more: str) -> int:
    golden = np.load(DATA / family / "golden.npz")
    described = json.loads((DATA / family / "golden.json").read_text())["observations"][0]
    observed = {k.removeprefix("obs0."): golden[k] for k in golden if k.startswith(("obs0.image", "obs0.state"))}
    if "instruction" in described:
        observed["instruction"] = np.array(described["instruction"])
    if "noise" in golden:
        observed["noise"] = golden["noise"][0]
    np.savez(out / "obs.npz", **observed)
    (out / "act.npz").unlink(missing_ok=True)
    return main(["infer", str(folder), str(out / "obs.npz"), "--out", str(out / "act.npz"), *given(family), *more])


def actions(out: Path) -> np.ndarray:
    with np.load(out / "act.npz") as written:
        return written["actions"]


def expected(family: str) -> np.ndarray:
    golden = np.load(DATA / family / "golden.npz")
    return (golden["actions"][0] if "actions" in golden else golden["obs0.actions"]).reshape(
        -1, golden["actions"].shape[-1]
    )


def layout(folder: Path, family: str, **options: Any) -> Layout:
    opened = open_folder(folder)
    return reader.layout(opened, replace(options_of(flags(family)), **options))


def spec(folder: Path, family: str, **options: Any) -> PolicySpec:
    return layout(folder, family, **options).spec
