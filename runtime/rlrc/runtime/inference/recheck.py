"""Verifies graphs again on another class of kernels or release of the engine than the recorded one.

A verification record holds for the kernels that it was measured with. On other kernels, the golden observations are
replayed before the first action. The cache folder remembers a success by the artifact's digest, the class of kernels
and the engine's release.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from time import monotonic

import numpy as np

from rlrc.artifact import GOLDEN, Artifact, VerifiedSpec
from rlrc.errors import UserError
from rlrc.libraries import cache_folder
from rlrc.runtime.inference import verify
from rlrc.runtime.inference.backends.kernels import UNKNOWN
from rlrc.runtime.inference.decode import NoAction

ENOUGH, ENOUGH_S = 4, 2.0  # replay at least this many observations, for at least this many seconds
REPORT_S = 3.0  # seconds between two lines of progress
IRRELEVANT = ("numpy", "machine")  # entries of an engine's versions that do not affect kernels


def check(policy: verify.GraphPolicy, record: VerifiedSpec) -> None:
    """Replays the golden observations unless they passed on these kernels before. Raises UserError if they disagree."""
    here = policy.engine.versions()
    if _kernel_versions(record.versions) == _kernel_versions(here) and not _is_unknown(here):
        return
    passed = _success_file(policy.artifact, policy.backend, here)
    if os.path.exists(passed):  # unlike Path.exists, false instead of an error without permission
        return
    try:
        reason = disagreement(policy, record)
    except NoAction as error:
        reason = f"no action: {error}"
    policy.reset()
    if reason is not None:
        raise UserError(
            f"expected the graphs of {policy.artifact.path}, verified with {_list_versions(record.versions)}, to agree "
            f"on {_list_versions(here)}, found {reason}; export it again on this machine, or with another --precision"
        )
    with suppress(OSError):  # no writable cache: the next load replays them again
        passed.parent.mkdir(parents=True, exist_ok=True)
        passed.write_text(json.dumps({"artifact": str(policy.artifact.path), **here}) + "\n")


def disagreement(policy: verify.GraphPolicy, record: VerifiedSpec) -> str | None:
    """How far the actions exceed the record's tolerances; None if they do not.

    Replays the observations in random order. Stops when more exceed the tolerances than allowed for the whole set, or
    after ``ENOUGH`` observations and ``ENOUGH_S`` seconds if no larger share than that does.
    """
    policy.artifact.verify(GOLDEN)
    golden, spec = verify.read_golden(policy.artifact.file(GOLDEN), policy.spec), policy.spec
    limits = verify.recorded_tolerances(record)
    scale, limit, part = np.ones(spec.action.dim), limits.tolerance, 0
    if limits.of_range is not None:
        scale, limit, part = verify.action_range(spec.action), limits.of_range, verify.ONE_IN
    beyond, worst = np.zeros(spec.action.dim, int), 0.0
    started = reported = monotonic()
    for count, index in enumerate(np.random.default_rng(0).permutation(len(golden)), 1):
        one = golden.rows([index])
        error = verify.errors(spec, verify.replay(policy, one), one, limits).max((0, 1)) / scale
        worst = float(np.maximum(worst, error.max()))  # keeps nan
        beyond += ~(error <= limit)
        if beyond.max() > _allowed(len(golden), part):
            found, most = (f"{worst:.2%} of the range", f"{limit:.2%}") if part else (f"{worst:.3g}", f"{limit:.3g}")
            return f"an error of {found} where {most} is tolerated, on {beyond.max()} of {count} observations"
        now = monotonic()
        if count >= ENOUGH and now - started > ENOUGH_S and beyond.max() <= _allowed(count, part):
            return None
        if now - reported > REPORT_S:
            reported = now
            print(
                f"rlrc: {policy.artifact.path} was verified on other kernels: {count} of up to {len(golden)} golden "
                "observations replayed here",
                file=sys.stderr,
                flush=True,
            )
    return None


def _allowed(observations: int, part: int) -> int:
    """How many observations may exceed the limit in a dimension."""
    return observations // part if part else 0


def _success_file(artifact: Artifact, backend: str, here: Mapping[str, str]) -> Path:
    """The file whose existence records a success."""
    key = json.dumps([artifact.digest, backend, _kernel_versions(here)], sort_keys=True)
    return cache_folder() / "verified" / hashlib.sha256(key.encode()).hexdigest()[:32]


def _kernel_versions(versions: Mapping[str, str]) -> dict[str, str]:
    return {name: version for name, version in versions.items() if name not in IRRELEVANT}


def _is_unknown(here: Mapping[str, str]) -> bool:
    return here.get("kernels", "").endswith(UNKNOWN)


def _list_versions(versions: Mapping[str, str]) -> str:
    """Such as "onnxruntime 1.32.0, kernels x86-64 avx2"."""
    return (
        ", ".join(f"{name} {version}" for name, version in _kernel_versions(versions).items())
        or "an engine not recorded"
    )
