"""What the stages say: which command makes sense next, what came of what was asked for, and what they refuse."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from families import DATA, flags
from rlrc import artifact as artifacts
from rlrc.artifact import HistoryEntry, LayerSpec, TowerSpec
from rlrc.compressor.cli import next_commands
from rlrc.compressor.cli.runners import runner
from rlrc.compressor.models.tiny import TinyPolicy
from rlrc.compressor.prune import cost
from rlrc.compressor.prune.prune import PruneConfig, format_report, prune
from rlrc.compressor.quantize.quantize import QuantizeConfig
from rlrc.compressor.rl.config import PPOConfig
from rlrc.compressor.stages.prune import run_prune
from rlrc.compressor.stages.stage import StageOptions
from rlrc.compressor.training.config import SFTConfig
from rlrc.compressor.training.distill import DistillConfig
from rlrc.errors import UserError
from rlrc.runtime.cli import main

QUIET = StageOptions(evaluate=0, workers=1, threads=1)


def entries(*stages: str) -> tuple[HistoryEntry, ...]:
    """ "lossless": prune --lossless."""
    return tuple(
        HistoryEntry("prune" if one == "lossless" else one, {"lossless": one == "lossless"}, "0.1.0", None, 0.0)
        for one in stages
    )


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        (("new",), ["sft"]),
        (("new", "sft"), ["prune", "quantize", "export"]),
        (("new", "sft", "prune"), ["sft", "distill", "quantize", "export"]),
        (("new", "sft", "prune", "sft"), ["rl", "quantize", "export"]),
        (("new", "sft", "prune", "distill"), ["rl", "quantize", "export"]),
        (("new", "sft", "prune", "sft", "rl"), ["quantize", "export"]),
        (("new", "sft", "prune", "sft", "rl", "quantize"), ["export"]),
        (("new", "quantize"), ["export"]),
    ],
)
def test_what_follows_a_stage(tiny_artifact: Path, stages: tuple[str, ...], expected: list[str]) -> None:
    manifest = replace(artifacts.load(tiny_artifact).manifest, history=entries(*stages))
    assert list(next_commands.following(manifest)) == expected
    told = next_commands.next_commands(Path("runs/x"), manifest)
    assert [part.split()[1] for part in told.split(", or ")] == expected
    assert "--data" not in told


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        (
            ("official", "prune"),
            "rlrc sft x OUT --data FOLDER, or rlrc distill x OUT --teacher DENSE --data FOLDER, or ",
        ),
        (
            ("official", "lossless"),
            "rlrc prune x OUT --data FOLDER, or rlrc sft x OUT --data FOLDER, or rlrc quantize ",
        ),
        (("official", "prune", "sft"), "rlrc quantize x OUT, or rlrc export x OUT"),
        (("official", "quantize"), "rlrc export x OUT"),
    ],
)
def test_families_without_a_simulator_need_data_and_play_nothing(
    tiny_artifact: Path, stages: tuple[str, ...], expected: str
) -> None:
    manifest = artifacts.load(tiny_artifact).manifest
    manifest = replace(manifest, policy=replace(manifest.policy, family="pi0"), history=entries(*stages))
    assert next_commands.next_commands(Path("x"), manifest).startswith(expected)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("prune", PruneConfig(0.5, "magnitude")),
        ("prune", PruneConfig(lossless=True)),
        ("sft", SFTConfig()),
        ("distill", DistillConfig(teacher="TEACHER")),
        ("rl", PPOConfig()),
        ("quantize", QuantizeConfig(bits=8)),
    ],
)
def test_no_stage_takes_what_is_quantized(
    tiny_artifact: Path, tiny_int4_artifact: Path, tmp_path: Path, name: str, config: Any
) -> None:
    if name == "distill":
        config = replace(config, teacher=str(tiny_artifact))
    with pytest.raises(UserError, match=r"expected an unquantized artifact, found int4 or int8 in .*quantize last"):
        runner(name)(tiny_int4_artifact, tmp_path / "out", config, QUIET)
    assert list(tmp_path.iterdir()) == []


def test_the_last_line_after_quantize_names_the_export_only(
    tiny_artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(tiny_artifact), str(tmp_path / "int8"), "--bits", "8", "--evaluate", "0", "--threads", "1"]
    assert main(["quantize", *arguments]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"next: rlrc export {tmp_path / 'int8'} OUT"


# What was asked for, and what came of it


def policy_of(layer: LayerSpec, policy: TinyPolicy) -> TinyPolicy:
    return TinyPolicy(policy.spec, policy.towers | {"decoder": TowerSpec(64, (layer,) * 4)})


def test_alignment_is_named_and_a_finer_one_that_comes_nearer(pupil: TinyPolicy) -> None:
    """96 channels aligned to 32 lose a third or two, not half; 4 heads of 32 lose half."""
    _, report = prune(policy_of(LayerSpec(4, 4, 32, 96), pupil), PruneConfig(0.5, "magnitude"))
    (wish,) = report["asked"]
    assert wish["asked"] == 0.5
    assert wish["got"] == report["intermediate"] != 0.5
    assert wish["reasons"] == ("widths stay multiples of 32",)
    assert wish["nearer"]["align"] == 16  # 48 channels
    assert wish["nearer"]["got"] == pytest.approx(0.5, abs=0.005)
    first = format_report(report)[0]
    assert first.startswith(f"asked for 50.0% of the decoder's intermediate blocks, got {wish['got']:.1%}: widths stay")
    assert "--align 16 gives 49" in first or "--align 16 gives 50" in first
    again = prune(policy_of(LayerSpec(4, 4, 32, 96), pupil), PruneConfig(0.5, "magnitude", align=16))[1]
    assert again["intermediate"] == wish["nearer"]["got"]


def test_heads_that_go_whole_and_those_that_stay_are_named(pupil: TinyPolicy) -> None:
    """Three heads lose one or two; two key/value heads of six stay."""
    _, report = prune(policy_of(LayerSpec(3, 3, 32, 32), pupil), PruneConfig(0.4, "magnitude"))
    assert "heads go whole" in report["asked"][0]["reasons"]
    _, report = prune(policy_of(LayerSpec(6, 2, 32, 32), pupil), PruneConfig(0.4, "magnitude"))
    assert "heads that several query heads share stay" in report["asked"][0]["reasons"]


def test_what_was_met_is_not_explained(pupil: TinyPolicy) -> None:
    _, report = prune(pupil, PruneConfig(0.5, "magnitude"))
    assert [line for line in format_report(report) if line.startswith("asked")] == []
    assert report["asked"][0]["reasons"] == ()


def test_targets_and_whole_blocks_say_what_they_came_to(pupil: TinyPolicy) -> None:
    bytes_ = cost.weight_bytes(pupil) * 3 // 4
    _, report = prune(pupil, PruneConfig(score="magnitude", to_bytes=f"{bytes_}"))
    assert format_report(report)[0] == f"asked for at most {bytes_:,} bytes, got {report['bytes']['int4']:,}"
    _, report = prune(pupil, PruneConfig(0.3, "magnitude", scope="whole"))
    (wish,) = report["asked"]
    assert (wish["what"], wish["asked"], wish["got"]) == ("whole policy", 0.3, report["whole"])
    _, report = prune(pupil, PruneConfig(0.4, "magnitude", kind="depth"))  # one of two blocks
    assert (
        format_report(report)[0] == "asked for 40.0% of the decoder's intermediate blocks, got 50.0%: blocks go whole"
    )
    _, report = prune(pupil, PruneConfig(score="magnitude", kind="depth", drop=1))
    assert report["asked"] == []


# Lossless cuts


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"ratio": 0.9}, "ratio"),
        ({"ratio": 0.5, "tower": "vision"}, "ratio, tower"),
        ({"to_bytes": "2GB"}, "to_bytes"),
        ({"data": "folder"}, "data"),
    ],
)
def test_lossless_takes_no_settings_in_silence(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=rf"expected prune\.lossless alone, found {named} with it"):
        PruneConfig(lossless=True, **settings)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--ratio", "1.5"], "expected prune.ratio between 0 and 1 (excluded), found 1.5; run rlrc prune --help"),
        (["--lossless", "--ratio", "0.5"], "expected prune.lossless alone, found ratio with it; leave lossless out"),
    ],
)
def test_what_a_configuration_refuses_is_said_as_it_stands(
    options: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prune", "here", "there", *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"rlrc: error: {line}")
    assert ("--help" in error) == (len(options) == 2)  # what has advice of its own gets no other


@pytest.mark.parametrize(
    "settings",
    [{"to_bytes": "2GB"}, {"to_latency": "0.4x"}, {"kind": "depth", "drop": 2}, {"kind": "depth", "blocks": (1,)}],
)
def test_a_ratio_beside_what_takes_its_place_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"expected prune\.ratio or .*, found both"):
        PruneConfig(0.5, **settings)
    assert PruneConfig(**settings).ratio is None


@pytest.mark.parametrize(("name", "tower"), [("pi05", "decoder"), ("openvla", "decoder"), ("act", "encoder")])
def test_pruning_an_official_folder_makes_every_lossless_cut(name: str, tower: str, tmp_path: Path) -> None:
    """The same cuts as --lossless alone, and one number of parameters everywhere."""
    folder, given = DATA / name / "checkpoint", flags(name)
    ratio = PruneConfig(0.5, "magnitude", keep=0, tower=tower)  # type: ignore[arg-type]
    alone = run_prune(folder, tmp_path / "lossless", PruneConfig(lossless=True), QUIET, given)
    both = run_prune(folder, tmp_path / "both", ratio, QUIET, given)
    cuts = [manifest.history[-1].after["lossless"]["cuts"] for manifest in (alone, both)]
    assert cuts[0] == cuts[1] != []
    assert alone.parameters == alone.history[-1].after["lossless"]["parameters"]["after"]
    after = both.history[-1].after
    assert both.parameters == after["removed"]["parameters"] < after["lossless"]["parameters"]["after"]
    assert json.loads(json.dumps(after["removed"]["asked"]))[0]["asked"] == 0.5
    stored = artifacts.load(tmp_path / "both").manifest
    assert stored.policy.action.tokens == alone.policy.action.tokens
