"""A recipe: one TOML file that says what the stages of a compression do; its tables are their configurations."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from rlrc.compressor.ppo import PPOConfig
from rlrc.compressor.prune import PruneConfig
from rlrc.compressor.quantize import QuantizeConfig
from rlrc.compressor.sft import SFTConfig
from rlrc.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Config = TypeVar("Config")


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


STAGES: dict[str, type] = {"prune": PruneConfig, "sft": SFTConfig, "rl": PPOConfig, "quantize": QuantizeConfig}
BUILT_IN = Path(__file__).parent / "recipes"


def parse(kind: type[Config], values: Any, where: str) -> Config:
    """A configuration from a TOML table; unknown keys and wrong types are refused."""
    if not isinstance(values, dict):
        raise UserError(f"expected a table [{where}], found {values!r}")
    hints = get_type_hints(kind)
    result: dict[str, Any] = {}
    for key, value in values.items():
        if key not in hints:
            raise UserError(f"expected keys of [{where}] out of {', '.join(hints)}; found {key!r}")
        default = next(field.default for field in dataclasses.fields(kind) if field.name == key)  # type: ignore[arg-type]
        value = tuple(value) if isinstance(value, list) else float(value) if _is_whole(value, default) else value
        if type(value) is not type(default):
            raise UserError(f"expected {type(default).__name__} for {where}.{key} (like {default!r}), found {value!r}")
        result[key] = value
    return kind(**result)


def _is_whole(value: Any, default: Any) -> bool:
    return isinstance(default, float) and type(value) is int


def load(recipe: str | Path) -> Recipe:
    """Read a recipe: a path, or the name of one that comes with rlrc ("reference", "compress", "demo")."""
    built_in = BUILT_IN / f"{recipe}.toml"
    file = built_in if built_in.exists() else Path(recipe)
    try:
        tables = tomllib.loads(file.read_text())
    except OSError as error:
        names = ", ".join(sorted(path.stem for path in BUILT_IN.glob("*.toml")))
        raise UserError(f"expected a recipe at {file} or one of {names}; found {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"expected TOML in {file}, found: {error}") from None
    if unknown := tables.keys() - STAGES.keys():
        raise UserError(f"expected the tables {', '.join(STAGES)} in {file}, found {', '.join(sorted(unknown))}")
    return Recipe(**{name: parse(STAGES[name], values, name) for name, values in tables.items()})


def section(recipe: str | Path, stage: str) -> Any:
    """One stage's configuration out of a recipe."""
    if (config := getattr(load(recipe), stage)) is None:
        raise UserError(f"expected a table [{stage}] in recipe {recipe}, found none; add it")
    return config
