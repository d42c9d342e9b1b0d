"""The commands inspect, infer and verify, as dataclasses whose field docstrings are the help texts."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, cast

from tyro.conf import OmitArgPrefixes, Positional, arg

from rlrc import artifact as artifacts
from rlrc.artifact import GOLDEN, VerifiedSpec
from rlrc.artifact.describe import folder_bytes
from rlrc.checkpoint_folder import Flags, is_checkpoint
from rlrc.errors import UserError
from rlrc.folders import check_output
from rlrc.npz import read_npz, write_npz
from rlrc.printable import printable
from rlrc.progress import status
from rlrc.runtime.cli import agreement
from rlrc.runtime.cli.describe import describe, format_trial_command, records_table
from rlrc.runtime.inference import backends, verify
from rlrc.runtime.inference.backends import Backend
from rlrc.runtime.inference.decode import NoAction
from rlrc.runtime.inference.policy import LocalPolicy, Policy, find_record
from rlrc.tables import plain_console, print_table

CHECKPOINTS = "rlrc.compressor.cli.checkpoints"  # opens official checkpoints with torch, which robots do not have


@dataclass(frozen=True)
class InspectPolicy:
    """Describe a policy: family, shape of every layer, parameters, bytes, cameras, actions, graphs, history."""

    path: Positional[Path | None] = None
    """the artifact, an official checkpoint's folder, or owner/name[@revision] on the hub"""
    geometry: str | None = None
    """instead of a path: the dimensions of openvla-7b, openvla-oft-7b, pi0, pi05, smolvla or act"""
    json: bool = False
    """print everything as JSON; for an artifact the manifest, its digest and the bytes of each kind of file"""
    checkpoint: OmitArgPrefixes[Flags] = field(default_factory=Flags)

    def run(self) -> None:
        if (self.path is None) == (self.geometry is None):
            raise UserError("expected either a path or --geometry, found both or neither; give one of them")
        if self.path is None or is_checkpoint(self.path, self.checkpoint):
            import_module(CHECKPOINTS).inspect(self.path, self.geometry, self.checkpoint, self.json)
            return
        artifact = artifacts.load(self.path)
        if self.json:
            values = artifacts.to_json(artifact.manifest) | {"digest": artifact.digest, "bytes": folder_bytes(artifact)}
            print(json.dumps(values, indent=1))
        else:
            describe(artifact, plain_console())


@dataclass(frozen=True)
class Infer:
    """Compute one chunk of actions from one observation, with an artifact's graphs or an official checkpoint."""

    path: Positional[Path]
    """the artifact, an official checkpoint's folder, or owner/name[@revision] on the hub"""
    observation: Annotated[Positional[Path], arg(metavar="OBS.npz")]
    """an .npz with `image.<camera>` (uint8, height x width x 3), `state` and `instruction`, optionally `noise`"""
    out: Annotated[Path, arg(metavar="ACT.npz")]
    """the .npz to write, with `actions` and `tokens`"""
    backend: Backend | None = None
    """which of the artifact's graphs to run (default: the first available of onnxruntime, tensorrt, gguf)"""
    threads: int = 1
    """threads of the engine"""
    device: str = "auto"
    """where torch runs an official checkpoint: auto (the accelerator that torch finds, else the CPU), cpu, cuda, cuda:N
    or mps"""
    json: bool = False
    """also print the actions, tokens and timing as JSON"""
    checkpoint: OmitArgPrefixes[Flags] = field(default_factory=Flags)

    def run(self) -> int:
        check_output(self.out)
        observation = read_observation(self.observation)
        try:
            result = self._policy().infer(observation)
        except NoAction as error:
            return fail_check(str(error))
        chunk: dict[str, Any] = {"actions": result["actions"]}
        if result["tokens"] is not None:
            chunk["tokens"] = result["tokens"]
        write_npz(self.out, **chunk)
        if self.json:
            values = {name: array.tolist() for name, array in chunk.items()}
            print(json.dumps(values | {"timing": result["timing"]}))
        else:
            timing = ", ".join(f"{name.removesuffix('_ms')} {ms:.2f} ms" for name, ms in result["timing"].items())
            print(f"{self.out}: {len(result['actions'])} actions of {result['actions'].shape[1]} dimensions ({timing})")
        return 0

    def _policy(self) -> Policy:
        if is_checkpoint(self.path, self.checkpoint):
            opened = import_module(CHECKPOINTS).policy(self.path, self.checkpoint, self.threads, self.device)
            return cast(Policy, opened)
        if self.device != "auto":
            raise UserError(
                f"expected --device with an official checkpoint, which torch runs, found the artifact {self.path}; "
                "choose the engine of its graphs with --backend"
            )
        return LocalPolicy.load(self.path, self.threads, backend=self.backend)


@dataclass(frozen=True)
class Verify:
    """Replay the golden observations through the graphs on this machine; exit code 1 if they disagree."""

    path: Positional[Path]
    """the artifact"""
    against: Path | None = None
    """compare with another artifact's graphs instead of the torch policy's recorded actions; the tolerance is then a
    fraction of every dimension's range on 99 % of the observations: 2 % with int4 weights, else 1 %"""
    env: tuple[str, ...] = ()
    """take the observations from episodes that the other artifact plays in these environments, such as
    metaworld:drawer-open-v3, instead of the golden ones; needs --against"""
    env_mapping: Path | None = None
    """TOML file that maps the environment's values to the policy's, for gym:ID"""
    episodes: int = 2
    """episodes to play in each environment"""
    backend: Backend | None = None
    """verify only this backend's graphs (default: all)"""
    threads: int = 1
    """threads of the engine"""
    json: bool = False
    """print the measured records as JSON"""

    def run(self) -> int:
        artifact = artifacts.load(self.path, verify=("graphs", "tokenizer", GOLDEN))
        manifest = artifact.manifest
        first = backends.choose(manifest, self.backend, self.path)
        here = backends.list_runnable(manifest)
        chosen = here if here and self.backend is None else [first]
        policies = [LocalPolicy(artifact, self.threads, backend) for backend in chosen]
        try:
            with status("verifying"):
                measured = self._against_torch(policies) if self.against is None else self._against_other(policies)
        except NoAction as error:
            return fail_check(str(error))
        reasons = [f"{record.backend}: {reason}" for record in measured if (reason := verify.failure_reason(record))]
        if self.json:
            print(json.dumps({"verified": [asdict(record) for record in measured], "failures": reasons}))
        else:
            reference = f"against {self.against or 'the torch policy'}, in action units"
            print_table(records_table(measured, manifest.policy, reference), plain_console())
        if reasons:
            remedy = f"export {self.path} again, with the versions of this machine"
            return fail_check(f"{'; '.join(reasons)}; {'choose another precision' if self.against else remedy}")
        if not self.json:
            plain_console().print(f"verified; next: {format_trial_command(self.path, manifest.policy)}")
        return 0

    def _against_torch(self, policies: list[LocalPolicy]) -> list[VerifiedSpec]:
        if self.env:
            raise UserError(
                "expected --against with --env, because the torch policy cannot be run here, found none; give both"
            )
        artifact = policies[0].artifact
        limits = [verify.recorded_tolerances(find_record(artifact, policy.backend)) for policy in policies]
        golden = verify.read_golden(artifact.file(GOLDEN), artifact.manifest.policy)
        return [verify.measure(policy, golden, limit) for policy, limit in zip(policies, limits, strict=True)]

    def _against_other(self, policies: list[LocalPolicy]) -> list[VerifiedSpec]:
        assert self.against is not None
        other = LocalPolicy.load(self.against, self.threads)
        artifact = policies[0].artifact
        agreement.check_comparable(policies[0], other)
        if self.env:
            reference = agreement.play(other, self.env, self.env_mapping, self.episodes)
        else:
            golden = verify.read_golden(artifact.file(GOLDEN), artifact.manifest.policy)
            reference = agreement.replay(other, golden)
        return [agreement.measure(policy, reference) for policy in policies]


def fail_check(reason: str) -> int:
    """Prints the reason to stderr, so that --json stays valid. -> exit code 1"""
    print("rlrc: check failed: " + printable(reason, keep="\n"), file=sys.stderr)
    return 1


def read_observation(path: Path) -> dict[str, Any]:
    """Reads an observation. numpy stores strings as arrays without dimensions; they become strings again."""
    arrays = read_npz(path)
    return {name: str(a) if a.ndim == 0 and a.dtype.kind == "U" else a for name, a in arrays.items()}
