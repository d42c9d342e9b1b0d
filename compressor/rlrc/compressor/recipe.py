"""A recipe: one TOML file that says what the stages of a compression do; its tables are their configurations."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlrc import strict
from rlrc.compressor.ppo import PPOConfig
from rlrc.compressor.prune import PruneConfig
from rlrc.compressor.quantize import QuantizeConfig
from rlrc.compressor.sft import SFTConfig
from rlrc.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True)
class Recipe:
    """A stage that the file does not name is left out; they run in this order."""

    prune: PruneConfig | None = None
    sft: SFTConfig | None = None
    rl: PPOConfig | None = None
    quantize: QuantizeConfig | None = None

    def stages(self) -> list[tuple[str, Any]]:
        pairs = [(field.name, getattr(self, field.name)) for field in dataclasses.fields(self)]
        return [(name, config) for name, config in pairs if config is not None]


BUILT_IN = Path(__file__).parent / "recipes"


def load(recipe: str | Path) -> Recipe:
    """Read a recipe: a path, or the name of one that comes with rlrc ("reference", "compress", "demo").

    Raises UserError for a file that cannot be read, and for anything in it that the stages do not know or allow.
    """
    built_in = BUILT_IN / f"{recipe}.toml"
    file = built_in if built_in.exists() else Path(recipe)
    try:
        return strict.decode(Recipe, tomllib.loads(file.read_text()))
    except OSError as error:
        names = ", ".join(sorted(path.stem for path in BUILT_IN.glob("*.toml")))
        raise UserError(f"expected a recipe at {file} or one of {names}; found {error.strerror}") from None
    except UserError as error:
        raise UserError(f"{error}; correct {file}") from None
    except ValueError as error:
        raise UserError(f"expected TOML in {file}, found: {error}; correct it") from None


def section(recipe: str | Path, stage: str) -> Any:
    """One stage's configuration out of a recipe."""
    if (config := getattr(load(recipe), stage)) is None:
        raise UserError(f"expected a table [{stage}] in recipe {recipe}, found none; add it")
    return config
