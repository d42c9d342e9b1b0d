"""The seam between what plays a policy and what it is played on, and how an environment is opened by its name.

``rlrc run`` and ``rlrc bench success`` know nothing else of a simulator. Opening one checks that it fits the policy.
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

# Scheme: the module whose ``for_policy(rest, spec, mapping)`` opens what is named behind the colon for a policy, and
# whose ``check``, of the same arguments, only sees whether that would fit, as far as it can tell in a moment.
SCHEMES = {"metaworld": "rlrc.envs.metaworld", "gym": "rlrc.envs.gym", "libero": "rlrc.envs.libero"}


class Environment(Protocol):
    """One task, played an episode after the other.

    ``name`` is what tables call it, ``hz`` its control rate and ``horizon`` the steps after which players end an
    episode. Observations are those of rlrc.runtime.inference.policy; actions (dim,) are the policy's, in its units.
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
        """Start the episode that belongs to the seed: its first observation, and whatever else (as Gymnasium)."""
        ...

    def advance(self, action: NDArray[np.float32], /) -> bool:
        """One control step without a picture; returns whether the task has been achieved, which ends the episode."""
        ...

    def observe(self) -> dict[str, Any]: ...

    def close(self) -> None: ...


def open_environment(name: str, spec: PolicySpec, mapping: Path | None = None) -> Environment:
    """The environment of a name such as metaworld:drawer-open-v3, for a policy.

    Raises UserError for a name that is not known, a mapping file that does not tell what is needed, and an environment
    whose cameras, state, instruction or actions are not the policy's.
    """
    module, rest = _module(name)
    environment: Environment = module.for_policy(rest, spec, mapping)
    return environment


def check_environment(name: str, spec: PolicySpec, mapping: Path | None = None) -> None:
    """Raises UserError as ``open_environment`` would, without what takes long."""
    module, rest = _module(name)
    module.check(rest, spec, mapping)


def _module(name: str) -> tuple[Any, str]:
    scheme, _, rest = name.partition(":")
    if scheme not in SCHEMES or not rest:
        raise UserError(
            f"expected an environment metaworld:TASK, gym:ID or libero:SUITE/NUMBER, found {name!r}; "
            "give --env metaworld:drawer-open-v3, for instance"
        )
    return importlib.import_module(SCHEMES[scheme]), rest


def check_fits(name: str, observation: Mapping[str, Any], actions: int, spec: PolicySpec, remedy: str) -> None:
    """Raises UserError unless the policy takes such observations and gives actions of so many dimensions.

    ``remedy`` says what to do about an observation that does not fit.
    """
    if spec.prompt is not None and not observation.get("instruction"):
        raise UserError(
            f"expected an instruction from {name}, for the policy is told what to do in words, found none; {remedy}"
        )
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
    """A TOML file as the frozen dataclass ``kind``. Raises UserError for a file that is none, or has unknown keys."""
    return read_toml(kind, path, f"a mapping file at {path}", "correct --env-mapping (docs/simulators.md)")
