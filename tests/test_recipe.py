"""Recipes: the built-in ones load, and anything a recipe can get wrong is one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlrc.compressor.prune.prune import PruneConfig, check
from rlrc.compressor.quantize.quantize import QuantizeConfig
from rlrc.compressor.rl.config import PPOOptions
from rlrc.compressor.stages import recipe, reference
from rlrc.compressor.training.config import SFTOptions
from rlrc.errors import UserError


def write(folder: Path, text: str) -> Path:
    file = folder / "my.toml"
    file.write_text(text)
    return file


STAGES = {
    "reference": ["sft"],
    "rlrc-90": ["prune", "sft", "rl", "quantize"],
    "rlrc-fit": ["prune", "sft", "rl", "quantize"],
    "depth-half": ["prune", "sft", "quantize"],
    "distill": ["prune", "distill", "quantize"],
    "demo": ["prune", "sft", "rl", "quantize"],
}


def test_built_in_recipes_load_and_fit_the_reference_policy() -> None:
    assert {file.stem for file in recipe.BUILT_IN.glob("*.toml")} == set(STAGES)
    for name, stages in STAGES.items():
        loaded = recipe.load(name)
        assert list(loaded) == stages, name
        if "prune" in loaded:
            check(reference.policy_spec(), reference.towers(), loaded["prune"])
    assert recipe.load("rlrc-90")["prune"] == PruneConfig(ratio=0.9, demonstrations=120)


def test_tables_become_configurations(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        "# stages run in their own order, not the file's\n"
        '[quantize]\nexempt = ["head.weight"]\nsearch = false\n'
        '[rl]\nclip = 1\n[prune]\nratio = 0.5\nscore = "random"\n',
    )
    read = recipe.load(file)
    assert read["prune"] == PruneConfig(ratio=0.5, score="random")
    assert read["rl"] == PPOOptions(clip=1.0)
    assert isinstance(read["rl"].clip, float)  # a whole number serves where a fraction is meant
    assert read["quantize"] == QuantizeConfig(exempt=("head.weight",), search=False)
    assert list(read) == ["prune", "rl", "quantize"]
    assert recipe.section(file, "prune") == read["prune"]


def test_an_empty_table_means_the_defaults(tmp_path: Path) -> None:
    assert recipe.load(write(tmp_path, "[sft]\n")) == {"sft": SFTOptions()}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[train]\nsteps = 3\n",
            r"expected the keys prune, sft, distill, rl, quantize .*found train, which is unknown",
        ),
        ("", r"expected at least one of the tables prune, .*found none"),
        ("# [prune]\n# ratio = 0.9\n", r"expected at least one of the tables prune, .*found none"),
        ("steps = 3\n", r"expected the keys prune, .*found steps, which is unknown"),
        ("prune = 0.9\n", r"expected an object with the keys of PruneConfig at prune, found 0\.9"),
        ("[sft]\nstep = 3\n", r"expected the keys steps, .* at sft, found sft\.step, which is unknown"),
        ('[sft]\nsteps = "many"\n', r"expected an integer at sft\.steps, found 'many'"),
        ("[sft]\nsteps = 2.5\n", r"expected an integer at sft\.steps, found 2\.5"),
        ("[sft]\nsteps = true\n", r"expected an integer at sft\.steps, found True"),
        ("[sft]\nrate = true\n", r"expected a number at sft\.rate, found True"),
        ("[quantize]\nsearch = 1\n", r"expected true or false at quantize\.search, found 1"),
        ('[quantize]\nexempt = "head.weight"\n', r"expected a list at quantize\.exempt, found 'head\.weight'"),
        ("[prune]\nratio = 1.5\n", r"expected prune\.ratio between 0 and 1 .*found 1\.5"),
        ("[prune]\nratio = nan\n", r"expected a finite number at prune\.ratio, found nan"),
        (
            '[prune]\nscore = "best"\n',
            r"expected one of 'taylor', .*'wanda' at prune\.score, found 'best'",
        ),
        ("[rl]\ntemperature = 0\n", r"expected rl\.temperature > 0, found 0"),
        ("[prune\nratio = 0.9\n", r"expected TOML in .*my\.toml, found: .*line 1"),
        ("[prune]\nratio = 0.9\nratio = 0.8\n", r"expected TOML in .*my\.toml, found: "),
    ],
)
def test_a_wrong_recipe_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        recipe.load(write(tmp_path, text))
    assert "\n" not in str(error.value)
    assert "my.toml" in str(error.value)


def test_missing_file_and_folder_and_binary_are_refused(tmp_path: Path) -> None:
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe\x00")
    cases = {
        "nowhere": "expected a recipe at nowhere or one of demo, depth-half, distill, reference, rlrc-90, rlrc-fit",
        str(tmp_path): "expected a recipe at .*directory",
        str(binary): "expected TOML in .*binary.toml",
    }
    for name, message in cases.items():
        with pytest.raises(UserError, match=message) as error:
            recipe.load(name)
        assert "\n" not in str(error.value)


def test_a_section_the_recipe_lacks_is_refused() -> None:
    with pytest.raises(UserError, match=r"expected a table \[prune\] in recipe reference, found none"):
        recipe.section("reference", "prune")
