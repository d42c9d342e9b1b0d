"""Weights in shards and in mapped files give the artifacts that weights in one file and in memory give, bit by bit."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from families import DATA, flags
from rlrc import artifact as artifacts
from rlrc.artifact import weight_files
from rlrc.checkpoint_folder import Flags
from rlrc.compressor.checkpoints import reader
from rlrc.compressor.models.storage.tensor_files import write_tensors
from rlrc.compressor.prune.config import PruneConfig
from rlrc.compressor.quantize.quantize import QuantizeConfig
from rlrc.compressor.stages import artifact_io
from rlrc.compressor.stages.prune import run_prune
from rlrc.compressor.stages.quantize import run_quantize
from rlrc.compressor.stages.stage import StageOptions
from rlrc.exporters.export import export
from rlrc.exporters.graphs import constants
from rlrc.runtime.cli import main

OPTIONS = StageOptions(evaluate=0, workers=1, threads=1, precision="float32")


def digests(folder: Path) -> dict[str, object]:
    """Of the tensors by name, the golden answers, and the graphs."""
    artifact = artifacts.load(folder)
    tensors = artifact_io.open_tensors(artifact)
    files = {name: spec for name, spec in artifact.manifest.files.items() if name.startswith(("golden", "graphs"))}
    return files | {name: tensors[name].flatten().tolist() for name in tensors}


def chain(folder: Path, checkpoint: Path, given: Flags, method: str) -> list[dict[str, object]]:
    """The digests of a pruned, a quantized and an exported artifact of the checkpoint."""
    pruned, quantized, exported = (folder / name for name in ("pruned", "quantized", "exported"))
    run_prune(checkpoint, pruned, PruneConfig(ratio=0.5, score="magnitude", keep=0), OPTIONS, given)
    run_quantize(pruned, quantized, QuantizeConfig(method=method), OPTIONS)  # type: ignore[arg-type]
    export(artifacts.load(quantized), exported)
    return [digests(path) for path in (pruned, quantized, exported)]


@pytest.mark.parametrize(("family", "method"), [("openvla", "gptq"), ("smolvla", "awq"), ("act", "rtn")])
def test_a_chain_of_stages(family: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, given = DATA / family / "checkpoint", flags(family)
    expected = chain(tmp_path / "usual", checkpoint, given, method)
    with monkeypatch.context() as patch:
        patch.setattr(reader, "MAPPED", 0)
        patch.setattr(constants, "KEPT", 1)
        patch.setattr(artifact_io, "write_tensors", partial(write_tensors, shard=20_000))
        assert chain(tmp_path / "streamed", checkpoint, given, method) == expected
    assert len(weight_files(artifacts.load(tmp_path / "streamed/exported").manifest)) > 2
    assert main(["verify", str(tmp_path / "streamed/exported")]) == 0
