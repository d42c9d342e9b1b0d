"""A recipe: a TOML file with one table for each stage of a compression, its configuration."""

from __future__ import annotations

import importlib
from collections.abc import Container
from pathlib import Path
from typing import Any

from rlrc import strict
from rlrc.errors import UserError

# Stages in the order in which they run -> their configurations, imported when needed because some import torch.
CONFIGS = {
    "prune": "rlrc.compressor.prune.prune:PruneConfig",
    "sft": "rlrc.compressor.training.config:SFTOptions",
    "distill": "rlrc.compressor.training.distill:DistillOptions",
    "rl": "rlrc.compressor.rl.config:PPOOptions",
    "quantize": "rlrc.compressor.quantize.quantize:QuantizeConfig",
}

BUILT_IN = Path(__file__).parent / "recipes"


def load(recipe: str | Path, wanted: Container[str] = CONFIGS) -> dict[str, Any]:
    """Read a recipe: a path, or the name of a built-in one ("reference", "rlrc-90", "demo").

    -> the configurations of its stages, in order. Tables of stages that are not ``wanted`` are ignored. Raises
    UserError for a file that cannot be read, unknown keys, and values that a stage does not allow.
    """
    built_in = BUILT_IN / f"{recipe}.toml"
    file = built_in if built_in.exists() else Path(recipe)
    names = ", ".join(sorted(path.stem for path in BUILT_IN.glob("*.toml")))
    tables = strict.read_toml(dict[str, Any], file, f"a recipe at {file} or one of {names}")
    try:
        strict.check_keys(tables, CONFIGS)
        if not tables:
            raise UserError(f"expected at least one of the tables {', '.join(CONFIGS)}, found none")
        chosen = [stage for stage in CONFIGS if stage in tables and stage in wanted]
        return {stage: strict.decode(config_of(stage), tables[stage], stage) for stage in chosen}
    except UserError as error:
        raise UserError(f"{error}; correct {file}") from None


def config_of(stage: str) -> type:
    """The configuration class of a stage."""
    module, name = CONFIGS[stage].split(":")
    found: type = getattr(importlib.import_module(module), name)
    return found


def section(recipe: str | Path, stage: str) -> Any:
    """One stage's configuration. Raises UserError if the recipe has no such table."""
    if stage not in (found := load(recipe, (stage,))):
        raise UserError(f"expected a table [{stage}] in recipe {recipe}, found none; add it")
    return found[stage]
