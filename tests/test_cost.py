"""What shapes cost, against the tensors of a quantized policy, hooks in a real pass, and multiply-adds by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlrc.artifact import ActionSpec, CameraSpec, LayerSpec, NormStats, PolicySpec, PromptSpec, TokenSpec, TowerSpec
from rlrc.compressor.models import decode
from rlrc.compressor.models.families import build
from rlrc.compressor.models.meta import build_on_meta
from rlrc.compressor.models.nn.decoder import Decoder
from rlrc.compressor.models.policy import Inputs, PolicyModule
from rlrc.compressor.models.tiny import TinyPolicy
from rlrc.compressor.models.weights import count_parameters
from rlrc.compressor.prune import cost
from rlrc.compressor.quantize.quantize import QuantizeConfig, quantize


def test_bytes_are_those_of_the_quantized_tensors(pupil: TinyPolicy) -> None:
    meta = build_on_meta(pupil.spec, pupil.towers)
    packed, *_ = quantize(pupil.state_dict(), QuantizeConfig(search=False))
    assert cost.weight_bytes(meta) == sum(tensor.nbytes for tensor in packed.values())
    assert cost.weight_bytes(meta, "bf16") == 2 * count_parameters(pupil) == 2 * count_parameters(meta)


def product(rows: int, inputs: int, outputs: int) -> float:
    return max(rows, cost.BALANCE) * (inputs * outputs + cost.ELEMENT * (inputs + outputs))


def test_a_decoder_s_pass_by_hand() -> None:
    tower = TowerSpec(64, (LayerSpec(4, 2, 16, 96),))
    with torch.device("meta"):
        decoder, x = Decoder(tower), torch.empty(1, 50, 64)
        with torch.no_grad(), cost.OperationCounter() as work:
            decoder(x)
    linear = product(50, 64, 64) + 2 * product(50, 64, 32) + product(50, 64, 64)
    linear += 2 * product(50, 64, 96) + product(50, 96, 64)
    assert work.total == linear + 2 * 50 * 50 * 64  # attention: scores and mixtures
    with cost.OperationCounter() as repeated, repeated.repeat(3), torch.no_grad(), torch.device("meta"):
        decoder(x[:, :1])
    single = product(20, 64, 64) * 2 + 2 * product(20, 64, 32) + 2 * product(20, 64, 96) + product(20, 96, 64)
    assert repeated.total == 3 * (single + 2 * 64)


def counted(policy: PolicyModule, inputs: Inputs) -> float:
    """The linear layers and convolutions that a real decision passes, by hooks."""
    total = 0.0

    def add(module: Any, given: tuple[Tensor, ...], out: Tensor) -> None:
        nonlocal total
        inner = module.weight[0].numel()
        total += product(out.numel() // len(module.weight), inner, len(module.weight))

    hooks = [module.register_forward_hook(add) for module in policy.modules() if isinstance(module, nn.Linear)]
    with torch.no_grad():
        policy.act(inputs)
    for hook in hooks:
        hook.remove()
    return total


def test_a_decision_of_the_reference_family_is_what_it_really_passes(pupil: TinyPolicy) -> None:
    inputs = Inputs([torch.randn(1, 32, 32, 3)], torch.zeros(1, 6, dtype=torch.long), torch.zeros(1, 7))
    linear = counted(pupil, inputs)
    found = cost.decision_cost(build_on_meta(pupil.spec, pupil.towers))
    sequence = pupil.image_tokens + 6 + 1 + 5
    patches = (32 // 8) ** 2
    attention = 4 * 2 * sequence**2 * 128 + 2 * patches**2 * 32
    assert found == linear + attention


def test_an_autoregressive_decision_reads_the_decoder_for_every_token() -> None:
    action = ActionSpec(1, tuple("abcdefg"), ("delta",) * 7, ("m",) * 7, NormStats((0.0,) * 7, (1.0,) * 7), 255)
    action = replace(action, tokens=TokenSpec(300, 0, 299))
    camera = CameraSpec("image0", 56, 56, "bicubic", (0.5,) * 3, (0.5,) * 3, "HWC")
    geometry = {"vocabulary": 300, "patch": 14, "extra": [0], "scaled": [False], "projector": [40, 32]}
    prompt = PromptSpec("{instruction}", 64, None)
    spec = PolicySpec("openvla", "autoregressive", (camera,), None, prompt, action, geometry)
    towers = {
        "vision": TowerSpec(24, (LayerSpec(3, 3, 8, 48),), eps=1e-6, activation="gelu"),
        "decoder": TowerSpec(32, (LayerSpec(4, 4, 8, 64),) * 2),
    }
    policy = build(spec, towers).eval()
    pixels, ids = torch.randn(1, 56, 56, 3), torch.zeros(1, cost.PROMPT, dtype=torch.long)
    linear = counted(policy, Inputs([pixels], ids))
    with torch.no_grad():
        assert decode.encode_images(policy, Inputs([pixels], ids)).shape[1] == 16
    first, patches = cost.PROMPT + 16, 16
    attention = 2 * (2 * first**2 * 32 + 6 * 2 * (first + 1) * 32) + 2 * patches**2 * 24
    stem = product(patches, 14 * 14 * 3, 24)
    assert cost.decision_cost(build_on_meta(spec, towers)) == linear + attention + stem


@pytest.mark.parametrize("kind", ["heads", "mlp"])
def test_less_costs_less(pupil: TinyPolicy, kind: str) -> None:
    decoder = pupil.towers["decoder"]
    layer = decoder.layers[0]
    narrow = replace(layer, heads=2, kv_heads=2) if kind == "heads" else replace(layer, mlp=64)
    towers = pupil.towers | {"decoder": replace(decoder, layers=(narrow,) * 4)}
    for price in (cost.decision_cost, cost.weight_bytes, count_parameters):
        assert price(build_on_meta(pupil.spec, towers)) < price(build_on_meta(pupil.spec, pupil.towers))
