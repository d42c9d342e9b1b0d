"""The interface of simulators, and opening one by its name.

``rlrc run`` and ``rlrc bench success`` use simulators through this interface only. Opening one checks that it fits the
policy.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from rlrc.artifact import PolicySpec
from rlrc.errors import UserError
from rlrc.runtime.inference import preprocess
from rlrc.strict import read_toml

T = TypeVar("T")

# By scheme: a module with ``for_policy(rest, spec, mapping)``, which opens the environment named behind the colon for a
# policy, and ``check`` with the same arguments, which only makes the quick checks of whether it fits.
SCHEMES = {"metaworld": "rlrc.envs.metaworld", "gym": "rlrc.envs.gym", "libero": "rlrc.envs.libero"}


class Environment(Protocol):
    """One task, run episode by episode.

    ``name``: its label in tables; ``hz``: its control rate; ``horizon``: the steps after which callers end an episode.
    Observations are those of rlrc.runtime.inference.policy; actions (dim,) are the policy's, in its units.
    """

    @property
    def name(self) -> str: ...

    @property
    def hz(self) -> float: ...

    @property
    def horizon(self) -> int: ...

    @property
    def over(self) -> bool:
        """Whether the episode has ended, by success or by the environment's own rules."""
        ...

    def reset(self, *, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Start the episode of this seed: returns its first observation, and additional information as in Gymnasium."""
        ...

    def advance(self, action: NDArray[np.float32], /) -> bool:
        """One control step without a picture; returns whether the task is achieved, which ends the episode."""
        ...

    def observe(self) -> dict[str, Any]: ...

    def close(self) -> None: ...


def open_environment(name: str, spec: PolicySpec, mapping: Path | None = None) -> Environment:
    """Open an environment by a name such as metaworld:drawer-open-v3, for a policy.

    Raises UserError for an unknown name, an incomplete mapping file, and an environment whose cameras, state,
    instruction or actions do not fit the policy.
    """
    module, rest = _find_module(name)
    environment: Environment = module.for_policy(rest, spec, mapping)
    return environment


def check_environment(name: str, spec: PolicySpec, mapping: Path | None = None) -> None:
    """Make the quick checks of ``open_environment`` only. Raises UserError."""
    module, rest = _find_module(name)
    module.check(rest, spec, mapping)


def _find_module(name: str) -> tuple[Any, str]:
    scheme, _, rest = name.partition(":")
    if scheme not in SCHEMES or not rest:
        raise UserError(
            f"expected an environment metaworld:TASK, gym:ID or libero:SUITE/NUMBER, found {name!r}; "
            "give --env metaworld:drawer-open-v3, for instance"
        )
    return importlib.import_module(SCHEMES[scheme]), rest


def check_fits(name: str, observation: Mapping[str, Any], actions: int, spec: PolicySpec, remedy: str) -> None:
    """Raises UserError unless the policy takes such observations and its actions have this many dimensions.

    ``remedy``: what to do about an observation that does not fit.
    """
    if spec.prompt is not None and not observation.get("instruction"):
        raise UserError(f"expected an instruction from {name}, which the policy needs, found none; {remedy}")
    try:
        preprocess.check(observation, spec)
    except UserError as error:
        raise UserError(f"{error} (found in {name}: {remedy})") from None
    if actions != spec.action.dim:
        raise UserError(
            f"expected actions of {actions} dimensions for {name}, found {spec.action.dim} of the policy "
            f"({', '.join(spec.action.names)}); {remedy}"
        )


def read_mapping(kind: type[T], path: Path) -> T:
    """A TOML file as the frozen dataclass ``kind``. Raises UserError for another file, and for unknown keys."""
    return read_toml(kind, path, f"a mapping file at {path}", "correct --env-mapping (docs/simulators.md)")
