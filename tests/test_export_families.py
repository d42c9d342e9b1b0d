"""Every family from its official folder to the runtime: pruned, quantized, exported, and the same actions as torch.

The graphs and numpy's decode drivers against the torch modules and torch's decode drivers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from families import DATA, FAMILIES, flags, official  # noqa: E402
from rlrc import artifact as artifacts  # noqa: E402
from rlrc.artifact import LayerSpec, PolicySpec, TowerSpec  # noqa: E402
from rlrc.compressor.checkpoints.torch_policy import TorchPolicy  # noqa: E402
from rlrc.compressor.models import weights  # noqa: E402
from rlrc.compressor.models.coupling import find_groups  # noqa: E402
from rlrc.compressor.models.families import build  # noqa: E402
from rlrc.compressor.models.policy import PolicyModule  # noqa: E402
from rlrc.compressor.prune.importance import score_parts as scores_of  # noqa: E402
from rlrc.compressor.prune.lossless import cut_lossless  # noqa: E402
from rlrc.compressor.prune.prune import PruneConfig, prune  # noqa: E402
from rlrc.compressor.quantize.quantize import QuantizeConfig  # noqa: E402
from rlrc.compressor.rl.config import PPOConfig  # noqa: E402
from rlrc.compressor.stages import artifact_io, quantize, rl, sft, sources  # noqa: E402
from rlrc.compressor.stages import prune as stages_prune  # noqa: E402
from rlrc.compressor.stages.sources import OfficialSource, examples  # noqa: E402
from rlrc.compressor.stages.stage import StageOptions  # noqa: E402
from rlrc.compressor.training.config import SFTConfig  # noqa: E402
from rlrc.errors import UserError  # noqa: E402
from rlrc.exporters.export import export  # noqa: E402
from rlrc.exporters.graphs import builder  # noqa: E402
from rlrc.runtime.cli import main  # noqa: E402
from rlrc.runtime.inference.policy import LocalPolicy  # noqa: E402
from rlrc.runtime.inference.preprocess import prompt_has_state  # noqa: E402

TOKENS = ("openvla", "openvla-oft-discrete")
QUIET = StageOptions(evaluate=0, workers=1, threads=1)
CLOSE = 1e-4  # in action units; actions are of size 0.1 to 4, their errors about 1e-6


VISION = ("openvla", "openvla-oft-l1", "openvla-oft-discrete")  # with two vision transformers
FLOWS = ("pi0", "pi05", "smolvla")
CUTS = [
    *((name, None) for name in FAMILIES),
    *((name, tower) for name in FLOWS for tower in ("expert", "vision")),
    *((name, tower) for name in VISION for tower in ("vision", "vision2")),
]


def config(name: str, **settings: Any) -> PruneConfig:
    """Half of the parts; of towers of two blocks, both."""
    short = name in ("act", "openvla-oft-l1") or settings.get("tower") in ("vision", "vision2")
    return PruneConfig(**{"ratio": 0.5, "score": "magnitude", "keep": 0 if short else 1, **settings})


def observations(source: OfficialSource) -> list[dict[str, Any]]:
    arrays = examples(source.spec, source.tokenizer, seed=5)  # others than those in the artifact
    texts = arrays.pop("instructions", None)
    arrays.pop("ids", None)
    rows: list[dict[str, Any]] = [{name: array[i] for name, array in arrays.items()} for i in range(2)]
    for i, row in enumerate(rows):
        row |= {} if texts is None else {"instruction": str(texts[i])}
    return rows


def in_torch(policy: PolicyModule, source: OfficialSource) -> TorchPolicy:
    return TorchPolicy(policy.spec, source.tokenizer, lambda: policy)


def check_same(exported: Path, policy: PolicyModule, source: OfficialSource, rows: list[dict[str, Any]]) -> np.ndarray:
    """The exported artifact answers as the torch policy does; returns the tokens, or else the actions."""
    local, reference, answers = LocalPolicy.load(exported), in_torch(policy, source), []
    for row in rows:
        found, expected = local.infer(row), reference.infer(row)
        if expected["tokens"] is not None:
            assert found["tokens"].tolist() == expected["tokens"].tolist()
        np.testing.assert_allclose(found["actions"], expected["actions"], rtol=0, atol=CLOSE)
        answers.append(found["actions"] if found["tokens"] is None else found["tokens"])
    return np.stack(answers)


def alike(rows: list[dict[str, Any]], spec: PolicySpec) -> list[dict[str, Any]]:
    """With prompts of one length: all is the first row's but pictures, noise and, where it is not told, the state."""
    own = ("image.", "noise") if prompt_has_state(spec) else ("image.", "noise", "state")
    return [{**rows[0], **{name: value for name, value in row.items() if name.startswith(own)}} for row in rows]


def check_together(policy: LocalPolicy, rows: list[dict[str, Any]]) -> None:
    """In one pass of every graph each observation is answered as alone."""
    rows = alike(rows, policy.spec)
    together, alone = policy.infer_batch(rows), [policy.infer(row) for row in rows]
    for found, expected in zip(together, alone, strict=True):
        assert (found["tokens"] is None) == (expected["tokens"] is None)
        np.testing.assert_allclose(found["actions"], expected["actions"], rtol=0, atol=CLOSE)
    assert np.abs(together[0]["actions"] - together[1]["actions"]).max() > CLOSE


# From the official folder, by the commands' own functions


@pytest.mark.parametrize(("name", "tower"), CUTS)
def test_pruned_exported_and_run(name: str, tower: Any, tmp_path: Path) -> None:
    source, dense = official(name)
    stages_prune.run_prune(
        DATA / name / "checkpoint", tmp_path / "pruned", config(name, tower=tower), QUIET, flags(name)
    )
    pruned = artifacts.load(tmp_path / "pruned")
    assert [entry.stage for entry in pruned.manifest.history] == ["official", "prune"]
    assert pruned.manifest.history[0].config["source"] == str(DATA / name / "checkpoint")
    assert pruned.manifest.parameters < weights.count_parameters(dense)
    export(pruned, tmp_path / "exported")
    assert artifacts.load(tmp_path / "exported").manifest.graphs[0].precision == "fp16"  # the goldens are in bfloat16
    rows = observations(source)
    answers = check_same(tmp_path / "exported", artifact_io.load_policy(pruned), source, rows)
    before = [in_torch(dense, source).infer(row) for row in rows]
    key = "actions" if before[0]["tokens"] is None else "tokens"
    assert (
        np.abs(answers - np.stack([dict[str, Any](row)[key] for row in before])).max() > 100 * CLOSE
    )  # what went did matter
    check_together(LocalPolicy.load(tmp_path / "exported"), rows)


@pytest.mark.parametrize("name", FAMILIES)
def test_without_what_no_action_depends_on(name: str, tmp_path: Path) -> None:
    source, dense = official(name)
    stages_prune.run_prune(
        DATA / name / "checkpoint", tmp_path / "lean", PruneConfig(lossless=True), QUIET, flags(name)
    )
    lean = artifacts.load(tmp_path / "lean")
    report = lean.manifest.history[-1].after["lossless"]
    assert report["bytes"]["after"] < report["bytes"]["before"]
    assert ("outside" in report) == (name in TOKENS)
    export(lean, tmp_path / "exported")
    # Random weights seldom prefer action tokens: there the cut policy is another one, as the report says.
    same = artifact_io.load_policy(lean) if name in TOKENS else dense
    check_same(tmp_path / "exported", same, source, observations(source))


@pytest.mark.parametrize("name", FAMILIES)
def test_quantized_exported_and_run(name: str, tmp_path: Path) -> None:
    source, _ = official(name)
    quantize.run_quantize(DATA / name / "checkpoint", tmp_path / "int4", QuantizeConfig(), QUIET, flags(name))
    int4 = artifacts.load(tmp_path / "int4")
    assert int4.manifest.dtype == "int4"
    export(int4, tmp_path / "exported")
    check_same(tmp_path / "exported", artifact_io.load_policy(int4), source, observations(source))


@pytest.mark.parametrize("name", ["act", "pi05", "smolvla"])
def test_products_of_8_bits_are_near(name: str, tmp_path: Path) -> None:
    """Unlike the others they are no exact copy; but no graph is built wrongly either."""
    source, policy = official(name)
    write(tmp_path / "artifact", policy, source)
    export(artifacts.load(tmp_path / "artifact"), tmp_path / "exported", precision="int8", tolerance=0.5)


CONSTANT = {  # center and scale that normalisation by each makes of a dimension that never moves
    "deviation": (0.3, 1e-8),
    "range": (-1.2, 5e-9),
    "quantiles": (0.5, 5e-7),
}


@pytest.mark.parametrize("constant", CONSTANT)
@pytest.mark.parametrize(
    ("name", "precision"), [("act", "fp32"), ("act", "int8"), ("openvla", "fp32"), ("pi0", "fp16")]
)
def test_a_policy_with_a_constant_dimension(name: str, precision: str, constant: str, tmp_path: Path) -> None:
    """The others are held to what they would be without it."""
    source, policy = official(name)
    center, scale = (list(values) for values in (policy.spec.action.norm.center, policy.spec.action.norm.scale))
    center[1], scale[1] = CONSTANT[constant]
    action = replace(
        policy.spec.action, norm=replace(policy.spec.action.norm, center=tuple(center), scale=tuple(scale))
    )
    still = weights.build_policy(replace(policy.spec, action=action), policy.towers, policy.state_dict(), "the test")
    write(tmp_path / "artifact", still, source)
    tolerance = 0.1 if precision == "int8" else None
    (record,) = export(
        artifacts.load(tmp_path / "artifact"), tmp_path / "out", precision=precision, tolerance=tolerance
    ).verified
    others = [width for i, width in enumerate(scale) if i != 1]
    assert record.tolerance == pytest.approx(tolerance or min(others) / (action.bins or 256))
    actions = LocalPolicy.load(tmp_path / "out").infer(observations(source)[0])["actions"]
    np.testing.assert_allclose(actions[:, 1], CONSTANT[constant][0], atol=1e-5)


def test_the_commands_go_from_a_folder_to_actions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given, out = DATA / "pi0", str(tmp_path / "pruned")
    options = ["--hints", str(given / "golden.json"), "--tokenizer", str(given / "tokenizer")]
    pruning = ["prune", str(given / "checkpoint"), out, *options, "--score", "magnitude", "--ratio", "0.5"]
    assert main([*pruning, "--threads", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] == artifacts.load(tmp_path / "pruned").manifest.parameters
    assert main(["export", out, str(tmp_path / "exported")]) == 0
    source, _ = official("pi0")
    row = observations(source)[0]
    np.savez(tmp_path / "obs.npz", **row)
    assert main(["infer", str(tmp_path / "exported"), str(tmp_path / "obs.npz"), "--out", str(tmp_path / "a.npz")]) == 0
    with np.load(tmp_path / "a.npz") as chunk:
        assert chunk.files == ["actions"]
        expected = in_torch(artifact_io.load_policy(artifacts.load(out)), source).infer(row)
        np.testing.assert_allclose(chunk["actions"], expected["actions"], atol=CLOSE)


def test_what_another_family_cannot_do_is_refused_before_its_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OfficialSource, "load", lambda self: pytest.fail("work began before the refusal"))
    given, out = DATA / "pi0/checkpoint", tmp_path / "out"
    with pytest.raises(UserError, match=r"demonstrations for prune.score taylor.*pi0; give --data FOLDER.*or --score"):
        stages_prune.run_prune(given, out, PruneConfig(0.5), QUIET, flags("pi0"))
    with pytest.raises(UserError, match=r"5 or more in all.*found 3 blocks"):
        stages_prune.run_prune(given, out, PruneConfig(0.5, "magnitude", keep=2), QUIET, flags("pi0"))
    with pytest.raises(UserError, match=r"quantize\.exempt.*decoder.layers.0.attention.q.weight.*found 'nothing'"):
        quantize.run_quantize(given, out, QuantizeConfig(("nothing",)), QUIET, flags("pi0"))
    source, policy = official("act")
    write(tmp_path / "act", policy, source)
    with pytest.raises(UserError, match=r"demonstrations for sft.*family act; give --data FOLDER"):
        sft.run_sft(tmp_path / "act", out, SFTConfig(), QUIET)
    with pytest.raises(UserError, match=r"square pictures.*found 96 x 128"):
        rl.run_rl(tmp_path / "act", out, PPOConfig(), QUIET)
    assert [path.name for path in tmp_path.iterdir()] == ["act"]


# Pruning itself


@pytest.mark.parametrize(("name", "tower"), CUTS)
def test_pruned_is_masked(name: str, tower: Any) -> None:
    """Every part that goes, silenced where it would add to the residual stream: the same actions."""
    source, dense = official(name)
    settings = config(name, tower=tower)
    pruned = prune(dense, settings)[0].build()
    (cut,) = (name for name, spec in dense.towers.items() if spec != pruned.towers[name])
    scores = scores_of(dense, cut, range(len(dense.towers[cut].layers)), settings)
    state = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    silenced = 0
    for i, score in enumerate(scores):
        after = pruned.towers[cut].layers[i]
        both = find_groups(dense.towers, cut, i, state)
        for group, values, count in zip(both, score.each(), (after.heads, after.mlp), strict=True):
            if group.number == 0:
                continue
            gone = sorted(set(range(group.number)) - set(group.select_best(values, count).tolist()))
            state[f"{group.columns[0]}.weight"][:, group.indices(torch.tensor(gone, dtype=torch.long))] = 0
            silenced += len(gone)
    assert silenced > 0
    masked = weights.build_policy(dense.spec, dense.towers, state, "the test")
    given = {name: array[:2] for name, array in source.observations().items()}
    found, expected, whole = (artifact_io.compute_outputs(p, given) for p in (pruned, masked, dense))
    np.testing.assert_allclose(found["actions"], expected["actions"], rtol=0, atol=1e-5)
    if name in TOKENS:
        scale = np.abs(expected["logits"]).max()  # up to 27
        np.testing.assert_allclose(found["logits"], expected["logits"], rtol=0, atol=1e-5 * scale)
    key = "logits" if name in TOKENS else "actions"
    assert np.abs(whole[key] - expected[key]).max() > 1e-3  # what went did matter


@pytest.mark.parametrize("name", FAMILIES)
def test_without_a_block_exported_and_run(name: str, tmp_path: Path) -> None:
    """The same as the dense policy, less what no action depends on, whose blocks return what they are given."""
    source, whole_policy = official(name)
    dense, _ = cut_lossless(whole_policy)
    settings = config(name, ratio=None, kind="depth", drop=1, score="random")
    stages_prune.run_prune(DATA / name / "checkpoint", tmp_path / "pruned", settings, QUIET, flags(name))
    artifact = artifacts.load(tmp_path / "pruned")
    pruned, gone = artifact_io.load_policy(artifact), artifact.manifest.history[-1].after["removed"]["dropped"]
    assert sorted(gone) == (["decoder", "expert"] if name in FLOWS else ["encoder" if name == "act" else "decoder"])

    def same(module: Any, inputs: Any, outputs: Any) -> Any:
        return (inputs[0], outputs[1]) if isinstance(outputs, tuple) else inputs[0]

    blocks = [dense.get_submodule(f"{tower}.layers.{i}") for tower, layers in gone.items() for i in layers]
    given = {name: array[:2] for name, array in source.observations().items()}
    key = "logits" if name in TOKENS else "actions"
    whole = artifact_io.compute_outputs(dense, given)[key]
    hooks = [block.register_forward_hook(same) for block in blocks]
    try:
        expected = artifact_io.compute_outputs(dense, given)[key]
    finally:
        for hook in hooks:
            hook.remove()
    scale = max(1, np.abs(expected).max())
    np.testing.assert_allclose(artifact_io.compute_outputs(pruned, given)[key], expected, rtol=0, atol=1e-5 * scale)
    assert np.abs(whole - expected).max() > 1e-3
    export(artifact, tmp_path / "exported")
    check_same(tmp_path / "exported", pruned, source, observations(source))


# Other geometries of the same families, with random weights


@dataclass(frozen=True)
class Case:
    name: str  # of the golden that it is a variant of
    change: Callable[[PolicySpec, dict[str, TowerSpec]], tuple[PolicySpec, dict[str, TowerSpec]]]
    missing: tuple[str, ...] = ()  # cameras that are not there


def geometry(spec: PolicySpec, **values: Any) -> PolicySpec:
    return replace(spec, geometry=spec.geometry | values)


def shaped(tower: TowerSpec, *layers: LayerSpec, **values: Any) -> TowerSpec:
    return replace(tower, layers=layers, **values)


def two_views(spec: PolicySpec) -> PolicySpec:
    """A second camera that may be missing, and pictures that are not square."""
    (camera, *_) = spec.cameras
    first = replace(camera, height=64, width=96)
    return replace(spec, cameras=(first, replace(first, name="wrist", optional=True)))


def openvla_single(spec: PolicySpec, towers: dict[str, TowerSpec]) -> tuple[PolicySpec, dict[str, TowerSpec]]:
    (camera,) = spec.cameras
    spec = replace(spec, cameras=(replace(camera, height=45, width=60, mean=camera.mean[:3], std=camera.std[:3]),))
    spec = geometry(spec, patch=15, extra=[2], scaled=[True], projector=[40, 20])
    decoder = shaped(towers["decoder"], LayerSpec(4, 2, 6, 33), LayerSpec(6, 1, 6, 5), width=20, theta=500.0)
    return replace(spec, action=replace(spec.action, horizon=2)), {"vision": towers["vision"], "decoder": decoder}


def oft_three(spec: PolicySpec, towers: dict[str, TowerSpec]) -> tuple[PolicySpec, dict[str, TowerSpec]]:
    camera = spec.cameras[0]
    cameras = tuple(replace(camera, name=f"image{i}") for i in range(3))
    spec = replace(spec, cameras=cameras, state=None, action=replace(spec.action, horizon=3))
    decoder = shaped(towers["decoder"], LayerSpec(4, 2, 4, 40), LayerSpec(2, 1, 4, 7), LayerSpec(2, 2, 4, 40))
    return geometry(spec, state=0, head_blocks=3), towers | {"decoder": decoder}


def pi0_wide(spec: PolicySpec, towers: dict[str, TowerSpec]) -> tuple[PolicySpec, dict[str, TowerSpec]]:
    decoder = shaped(
        towers["decoder"], LayerSpec(4, 2, 8, 33), LayerSpec(2, 2, 8, 9), LayerSpec(4, 4, 8, 40, "half"), eps=1e-3
    )
    expert = shaped(towers["expert"], LayerSpec(2, 2, 8, 40), LayerSpec(4, 2, 8, 12), LayerSpec(8, 4, 8, 5))
    spec = replace(spec, action=replace(spec.action, horizon=3))
    return two_views(spec), towers | {"decoder": decoder, "expert": expert}


def smolvla_sparse(spec: PolicySpec, towers: dict[str, TowerSpec]) -> tuple[PolicySpec, dict[str, TowerSpec]]:
    """A block of the expert for every second one of the prefix."""
    layers = (LayerSpec(4, 2, 8, 40), LayerSpec(2, 1, 8, 24), LayerSpec(6, 3, 8, 40, "half"))
    expert = (LayerSpec(4, 2, 8, 16, "cross"), LayerSpec(3, 3, 8, 16))
    return two_views(spec), towers | {
        "decoder": shaped(towers["decoder"], *layers),
        "expert": shaped(towers["expert"], *expert),
    }


def act_deep(spec: PolicySpec, towers: dict[str, TowerSpec]) -> tuple[PolicySpec, dict[str, TowerSpec]]:
    """Two cameras of different sizes, a ResNet of bottlenecks with a dilated end, norms before the branches."""
    (camera,) = spec.cameras
    spec = replace(spec, cameras=(camera, replace(camera, name="wrist", height=65, width=40)))
    values = {"blocks": [2, 1, 1, 2], "outputs": [32, 16, 24, 40], "widths": [8, 8, 12, 10]}
    spec = geometry(spec, **values, bottleneck=True, dilated=True, pre_norm=True, state=2, environment=4)
    encoder = shaped(towers["encoder"], LayerSpec(2, 2, 8, 20), LayerSpec(0, 0, 8, 24), LayerSpec(3, 3, 8, 0))
    self_, cross = LayerSpec(1, 1, 8, 0), LayerSpec(2, 2, 8, 12, "cross")
    decoder = shaped(towers["decoder"], self_, cross, self_, replace(cross, heads=3, kv_heads=3))
    return spec, {"encoder": encoder, "decoder": decoder}


CASES = {
    "openvla with one encoder, shared keys, no square": Case("openvla", openvla_single),
    "oft with three pictures and no state": Case("openvla-oft-l1", oft_three),
    "pi0 with two views": Case("pi0", pi0_wide),
    "pi0 with one of two views": Case("pi0", pi0_wide, missing=("wrist",)),
    "pi0.5 with two views": Case("pi05", lambda spec, towers: (two_views(spec), towers)),
    "smolvla with a sparse expert": Case("smolvla", smolvla_sparse),
    "act with bottlenecks": Case("act", act_deep),
}


def write(out: Path, policy: PolicyModule, source: OfficialSource) -> Path:
    with artifacts.create_artifact(out) as draft:
        source.copy_files(draft)
        artifact_io.write_policy(draft, policy, examples(policy.spec, source.tokenizer), (), exact=True)
    return out


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("case", CASES)
def test_other_geometries(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, _ = official(CASES[case].name)
    spec, towers = CASES[case].change(source.spec, source.towers)
    policy = build(spec, towers).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in policy.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(0.5 + 0.25 * noise if tensor.ndim == 1 else noise / tensor[0].numel() ** 0.5)
            if name.endswith("variance"):
                tensor.abs_().add_(0.1)
    write(tmp_path / "artifact", policy, source)
    manifest = export(artifacts.load(tmp_path / "artifact"), tmp_path / "exported")
    assert manifest.dtype == "float32"
    assert {graph.precision for graph in manifest.graphs} == {"fp32"}
    monkeypatch.setattr(source, "spec", spec)
    rows = [
        {name: value for name, value in row.items() if name.removeprefix("image.") not in CASES[case].missing}
        for row in observations(source)
    ]
    assert check_same(tmp_path / "exported", policy, source, rows).std(0).max() > 1e-3  # answers that differ


# Graphs that protobuf could not hold in one file


def test_large_graphs_keep_their_weights_beside_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, policy = official("pi0")
    write(tmp_path / "artifact", policy, source)
    monkeypatch.setattr(builder, "LARGE", 10_000)
    export(artifacts.load(tmp_path / "artifact"), tmp_path / "exported")
    files = artifacts.load(tmp_path / "exported").manifest.files
    assert files["graphs/onnx/prefix.onnx.data"].size > files["graphs/onnx/prefix.onnx"].size
    check_same(tmp_path / "exported", policy, source, observations(source))


# Observations for policies that came without


@pytest.mark.parametrize("name", FAMILIES)
def test_examples_lie_where_the_policy_expects_them(name: str) -> None:
    source, _ = official(name)
    made, spec = examples(source.spec, source.tokenizer), source.spec
    again = sources.examples(source.spec, source.tokenizer)
    assert all((array == again[key]).all() for key, array in made.items())
    for camera in spec.cameras:
        pictures = made[f"image.{camera.name}"]
        assert pictures.std((0, 1, 2)).min() > 50
        assert (pictures.shape[1:3] == (camera.height, camera.width)) == (camera.resize == "none")
    if spec.state is not None:
        distance = np.abs(made["state"] - np.array(spec.state.norm.center)) / np.array(spec.state.norm.scale)
        assert distance.max() <= 1 + 1e-6
        assert distance.mean() > 0.3
    assert ("ids" in made) == ("instructions" in made) == (spec.prompt is not None)
    if spec.prompt is not None:
        assert len(set(made["instructions"].tolist())) == 4
        assert (made["ids"][:, 0] >= 0).all()
    assert ("noise" in made) == (spec.flow is not None)
