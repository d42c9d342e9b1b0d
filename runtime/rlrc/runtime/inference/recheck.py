"""Graphs on another class of kernels, or release of the engine, than they were verified on.

A record of agreement holds for the kernels it was measured with: where an artifact is loaded to act on others, its
golden observations are replayed before the first action. Agreement is remembered in the user's cache folder, by the
artifact's digest, the class of kernels and the engine's release.
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

ENOUGH, ENOUGH_S = 4, 2.0  # observations and seconds to replay at least
REPORT_S = 3.0  # between two lines of progress
IRRELEVANT = ("numpy", "machine")  # entries of an engine's versions that choose no kernels


def check(policy: verify.GraphPolicy, record: VerifiedSpec) -> None:
    """Replays the golden observations unless that was done on these kernels. Raises UserError if they disagree."""
    here = policy.engine.versions()
    if _relevant(record.versions) == _relevant(here) and not _is_unknown(here):
        return
    agreed = _remembered(policy.artifact, policy.backend, here)
    if os.path.exists(agreed):  # unlike Path.exists, false for a folder without permission
        return
    try:
        reason = disagreement(policy, record)
    except NoAction as error:
        reason = f"no action: {error}"
    policy.reset()
    if reason is not None:
        raise UserError(
            f"expected the graphs of {policy.artifact.path}, verified with {_named(record.versions)}, to answer alike "
            f"with {_named(here)}, found {reason}; export it again on this machine, or with another --precision"
        )
    with suppress(OSError):  # a cache that cannot be written: they are replayed again the next time
        agreed.parent.mkdir(parents=True, exist_ok=True)
        agreed.write_text(json.dumps({"artifact": str(policy.artifact.path), **here}) + "\n")


def disagreement(policy: verify.GraphPolicy, record: VerifiedSpec) -> str | None:
    """How far the answers are beyond the record's limits; None if they are within them.

    Replays the observations in random order. Stops when more of them are beyond the limits than the record allows for
    the whole set, or after ``ENOUGH`` observations and ``ENOUGH_S`` seconds if no larger share than that is beyond.
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
        worst = float(np.maximum(worst, error.max()))  # nan stays
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
    """How many of them may be beyond the limits in a dimension."""
    return observations // part if part else 0


def _remembered(artifact: Artifact, backend: str, here: Mapping[str, str]) -> Path:
    """The file that records an agreement."""
    key = json.dumps([artifact.digest, backend, _relevant(here)], sort_keys=True)
    return cache_folder() / "verified" / hashlib.sha256(key.encode()).hexdigest()[:32]


def _relevant(versions: Mapping[str, str]) -> dict[str, str]:
    return {name: version for name, version in versions.items() if name not in IRRELEVANT}


def _is_unknown(here: Mapping[str, str]) -> bool:
    return here.get("kernels", "").endswith(UNKNOWN)


def _named(versions: Mapping[str, str]) -> str:
    """Such as "onnxruntime 1.32.0, kernels x86-64 avx2"."""
    return ", ".join(f"{name} {version}" for name, version in _relevant(versions).items()) or "an engine not recorded"
