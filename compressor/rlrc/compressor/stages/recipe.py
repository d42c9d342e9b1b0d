"""A recipe: one TOML file that says what the stages of a compression do; its tables are their configurations."""

from __future__ import annotations

import importlib
from collections.abc import Container
from pathlib import Path
from typing import Any

from rlrc import strict
from rlrc.errors import UserError

# Stage: where its configuration is, imported when asked for, because some need torch.
# A stage that the file does not name is left out; they run in this order.
CONFIGS = {
    "prune": "rlrc.compressor.prune.prune:PruneConfig",
    "sft": "rlrc.compressor.training.sft:SFTConfig",
    "distill": "rlrc.compressor.training.distill:DistillConfig",
    "rl": "rlrc.compressor.rl.config:PPOConfig",
    "quantize": "rlrc.compressor.quantize.quantize:QuantizeConfig",
}

BUILT_IN = Path(__file__).parent / "recipes"


def load(recipe: str | Path, wanted: Container[str] = CONFIGS) -> dict[str, Any]:
    """Read a recipe: a path, or the name of one that comes with rlrc ("reference", "rlrc-90", "demo").

    Returns the configurations of its stages in their order; those not ``wanted`` are left out and their tables not
    read. Raises UserError for a file that cannot be read, and for anything in it that the stages do not know or allow.
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
    """The class of a stage's configuration."""
    module, name = CONFIGS[stage].split(":")
    return getattr(importlib.import_module(module), name)


def section(recipe: str | Path, stage: str) -> Any:
    """One stage's configuration out of a recipe."""
    if stage not in (found := load(recipe, (stage,))):
        raise UserError(f"expected a table [{stage}] in recipe {recipe}, found none; add it")
    return found[stage]
