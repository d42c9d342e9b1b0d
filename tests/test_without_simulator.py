"""Official checkpoints are pruned and quantized where the simulator's packages are not installed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rlrc import artifact as artifacts

pytest.importorskip("torch")

from rlrc.artifact import WEIGHTS

DATA = Path(__file__).parent / "data"
OPENVLA = [DATA / "openvla/checkpoint", "--hints", DATA / "openvla/golden.json"]


def rlrc(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command without any package of the extra sim; its last line on stdout tells whether it loaded rlrc.envs."""
    code = f"""
import sys
sys.path[:0] = {[path for path in sys.path if path]}
sys.modules.update(dict.fromkeys(("fast_simplification", "gymnasium", "metaworld", "mujoco", "trimesh")))
from rlrc.runtime.cli import main
code = main(sys.argv[1:])
print("rlrc.envs" in sys.modules)
sys.exit(code)
"""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    # As on a user's machine, where nobody has chosen a backend for mujoco.
    environment = {name: value for name, value in os.environ.items() if name != "MUJOCO_GL"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def stages(path: Path) -> list[str]:
    return [entry.stage for entry in artifacts.load(path).manifest.history]


def check(done: subprocess.CompletedProcess[str], path: Path, expected: list[str]) -> None:
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False"
    assert stages(path) == expected


def test_prune_and_quantize(tmp_path: Path) -> None:
    pruned, quantized, both = tmp_path / "pruned", tmp_path / "int4", tmp_path / "both"
    recipe = tmp_path / "recipe.toml"  # of whose other tables nothing is needed
    recipe.write_text('[prune]\nratio = 0.5\nscore = "magnitude"\nkeep = 1\n[sft]\n[rl]\n')
    given, *flags = OPENVLA
    scored = ["--score", "magnitude", "--ratio", "0.5", "--keep", "1"]
    check(rlrc("prune", given, pruned, *flags, *scored), pruned, ["official", "prune"])
    check(rlrc("quantize", given, quantized, *flags), quantized, ["official", "quantize"])
    check(rlrc("quantize", pruned, both), both, ["official", "prune", "quantize"])
    by_recipe = tmp_path / "by-recipe"
    check(rlrc("prune", given, by_recipe, *flags, "--recipe", recipe), by_recipe, ["official", "prune"])
    assert artifacts.load(by_recipe).manifest.files[WEIGHTS] == artifacts.load(pruned).manifest.files[WEIGHTS]


def test_what_needs_them_says_what_to_install(tiny_artifact: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prune = ["prune", tiny_artifact, out, "--score", "random", "--ratio", "0.5"]
    for arguments in (["sft", tiny_artifact, out], prune):
        done = rlrc(*arguments)
        assert done.returncode == 2
        missing = "expected the module (gymnasium|metaworld), found none"
        assert re.fullmatch(rf"rlrc: error: {missing}; run pip install 'rlrc\[sim\]'\n", done.stderr)
    assert list(tmp_path.iterdir()) == []
