"""The stage prune: remove heads, channels and blocks by their scores, or only what no action depends on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlrc.artifact import Manifest
from rlrc.checkpoint_folder import Flags
from rlrc.compressor.models.meta import build_on_meta
from rlrc.compressor.prune import prune as pruning
from rlrc.compressor.prune.config import PruneConfig
from rlrc.compressor.prune.lossless import count_outside, cut_lossless
from rlrc.compressor.stages import memory
from rlrc.compressor.stages.artifact_io import compute_outputs
from rlrc.compressor.stages.sources import PolicySource
from rlrc.compressor.stages.stage import StageOptions, stage
from rlrc.compressor.stages.training_data import check_data
from rlrc.progress import status


def run_prune(
    source: Path, out: Path, config: PruneConfig, options: StageOptions, flags: Flags | None = None
) -> Manifest:
    def check(source: PolicySource, _: Any) -> None:
        memory.check(source, lambda: memory.of_prune(source, config), "pruning")
        if config.lossless:
            return
        with status("searching for a shape"):
            lean, _ = cut_lossless(build_on_meta(source.spec, source.towers))
            pruning.check(lean.spec, lean.towers, config)
        if config.needs_data:
            check_data(f"prune.score {config.score}", source, config, ", or --score magnitude")
        pruning.warn(source.towers, config)

    with stage("prune", source, out, config, options, check, flags) as work:
        lean, cuts = cut_lossless(work.policy, work.source.unread)
        if lean.spec.action.tokens != work.policy.spec.action.tokens:
            tokens = compute_outputs(work.policy, work.source.observations())["tokens"]
            cuts["outside"] = {"observations": len(tokens), "changed": count_outside(tokens, lean.spec.action)}
        report: dict[str, Any] = {"lossless": cuts} if config.lossless or cuts["cuts"] else {}
        if config.lossless:
            return work.finish(lean, exact=True, **report)
        batches = work.demonstrations(config) if config.needs_data else None
        with status("scoring heads, channels and blocks"):
            pruned, removed = pruning.prune(lean.to(work.device if batches else "cpu"), config, batches)
        return work.finish(pruned, exact=True, removed=removed, **report)
