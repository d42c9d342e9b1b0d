"""The policy families, and the module that implements each."""

from __future__ import annotations

from importlib import import_module

from rlrc.artifact import PolicySpec, TowerSpec
from rlrc.compressor.models.policy import PolicyModule
from rlrc.errors import UserError

# Imported only when a policy of the family is built.
FAMILIES = {
    "tiny": "tiny:TinyPolicy",
    "openvla": "openvla:OpenVLAPolicy",
    "openvla-oft": "oft:OFTPolicy",
    "pi0": "flow:FlowPolicy",
    "pi05": "flow:FlowPolicy",
    "smolvla": "flow:FlowPolicy",
    "act": "act:ACTPolicy",
}


def build(spec: PolicySpec, towers: dict[str, TowerSpec]) -> PolicyModule:
    """Build the module of a manifest's policy, without its weights. Raises UserError for an unknown family."""
    if spec.family not in FAMILIES:
        raise UserError(f"expected one of the families {', '.join(FAMILIES)}, found {spec.family!r}; upgrade rlrc")
    module, name = FAMILIES[spec.family].split(":")
    policy: PolicyModule = getattr(import_module(f"rlrc.compressor.models.{module}"), name)(spec, towers)
    return policy
