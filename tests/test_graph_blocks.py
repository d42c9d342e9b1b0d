"""The blocks that graphs are made of against the torch modules that they compute, all of their weights random."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

from torch import Tensor, nn  # noqa: E402

from rlrc.artifact import LayerSpec, TowerSpec  # noqa: E402
from rlrc.compressor.models.nn.decoder import Decoder, causal_mask  # noqa: E402
from rlrc.compressor.models.nn.vit import VisionTransformer  # noqa: E402
from rlrc.compressor.models.storage.tensors import Tensors  # noqa: E402
from rlrc.exporters.graphs import blocks  # noqa: E402
from rlrc.exporters.graphs.blocks import GraphContext  # noqa: E402
from rlrc.exporters.graphs.builder import Builder  # noqa: E402
from rlrc.exporters.graphs.weights import Weights  # noqa: E402
from rlrc.exporters.onnx.builder import FORMATS, OnnxRuntimeBuilder  # noqa: E402

WIDTH = 20
SHARED = (LayerSpec(4, 2, 6, 24), LayerSpec(6, 2, 6, 33), LayerSpec(2, 2, 6, 5))  # per layer other heads and channels
LLAMA = TowerSpec(WIDTH, SHARED, eps=1e-6)
GEMMA = TowerSpec(WIDTH, SHARED, eps=1e-3, activation="gelu-tanh", theta=100.0, norm_offset=1.0)
CLOSE = {"atol": 2e-5, "rtol": 2e-5}


class Wrapped(nn.Module):
    """A module under the name that its weights have in a policy."""

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, module in modules.items():
            self.add_module(name, module.eval())
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))

    def weights(self) -> Weights:
        return Weights(Tensors("a block", self.state_dict()))


def run(module: Wrapped, given: dict[str, Tensor], define: Callable[..., dict[str, str]]) -> dict[str, Tensor]:
    """What the graph computes that ``define(builder, **values)`` describes, all of its dimensions dynamic."""
    b = OnnxRuntimeBuilder(module.weights(), FORMATS["fp32"])
    values = {}
    for name, x in given.items():
        dtype = "int64" if x.dtype == torch.int64 else "float32"
        values[name] = b.input(name, dtype, tuple(f"{name}.{axis}" for axis in range(x.ndim)))
    outputs = define(b, **values)
    for name, value in outputs.items():
        b.output(name, value, "float32", ("?",) * 4 if "." in name else ("?",) * 3)
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = ort.InferenceSession(b.model("block").SerializeToString(), options, providers=["CPUExecutionProvider"])
    found = session.run(list(outputs), {name: x.numpy() for name, x in given.items()})
    return {name: torch.from_numpy(x) for name, x in zip(outputs, found, strict=True)}


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def whole_decoder(tower: TowerSpec, **options: Any) -> Callable[..., dict[str, str]]:
    """The decoder's graph, causal if asked for, with the past and the keys and values of every block."""

    def define(b: Builder, x: str, **past: str) -> dict[str, str]:
        start = b.size(past["past.0.key"], 2) if past else None
        places = blocks.positions(b, start, b.size(x, 1))
        mask = None
        if options.get("causal"):
            columns = blocks.positions(b, None, b.add(start, b.size(x, 1)) if start else b.size(x, 1))
            mask = blocks.causal_mask(b, places, columns)
        around = GraphContext(blocks.rotary_tables(b, places, tower), mask)
        outputs = {}
        for i, layer in enumerate(tower.layers):
            before = (past[f"past.{i}.key"], past[f"past.{i}.value"]) if past else None
            keep = options.get("keep") if i == len(tower.layers) - 1 else None
            name = f"decoder.layers.{i}"
            x, source = blocks.decoder_block(b, x, name, tower, layer, around, before, keep, cached=True)
            assert source is not None
            outputs |= {f"present.{i}.key": source[0], f"present.{i}.value": source[1]}
        if tower.layers[-1].kind == "half":
            return outputs
        return {"y": blocks.norm(b, x, "decoder.norm", tower)[0], **outputs}

    return define


@pytest.mark.parametrize("keep", [None, 2])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("tower", [LLAMA, GEMMA], ids=["llama", "gemma"])
def test_decoder_without_a_past(tower: TowerSpec, causal: bool, keep: int | None) -> None:
    module, x = Wrapped(decoder=Decoder(tower)), random(1, 7, WIDTH)
    with torch.no_grad():
        y, present = module.decoder(x, causal_mask(7) if causal else None)
    found = run(module, {"x": x}, whole_decoder(tower, causal=causal, keep=keep))
    torch.testing.assert_close(found["y"], y[:, -keep:] if keep else y, **CLOSE)
    for i, (key, value) in enumerate(present):
        torch.testing.assert_close(found[f"present.{i}.key"], key, **CLOSE)
        torch.testing.assert_close(found[f"present.{i}.value"], value, **CLOSE)


@pytest.mark.parametrize("length", [0, 5])
def test_decoder_goes_on_from_a_past(length: int) -> None:
    """All at once is the past, then the rest: the graph does the second part, with an empty past too."""
    module, x = Wrapped(decoder=Decoder(GEMMA)), random(1, 9, WIDTH)
    with torch.no_grad():
        expected, whole = module.decoder(x, causal_mask(9))
        _, past = module.decoder(x[:, :length], causal_mask(length))
    given = {"x": x[:, length:]}
    for i, (key, value) in enumerate(past):
        given |= {f"past.{i}.key": key, f"past.{i}.value": value}
    found = run(module, given, whole_decoder(GEMMA, causal=True))
    torch.testing.assert_close(found["y"], expected[:, length:], **CLOSE)
    torch.testing.assert_close(found["present.2.key"], whole[2][0], **CLOSE)


def test_a_half_block_at_the_end_gives_keys_and_values_only() -> None:
    tower = replace(LLAMA, layers=(*SHARED[:2], replace(SHARED[2], kind="half")))
    module, x = Wrapped(decoder=Decoder(tower)), random(1, 6, WIDTH)
    with torch.no_grad():
        _, present = module.decoder(x)
    found = run(module, {"x": x}, whole_decoder(tower))
    assert "y" not in found
    torch.testing.assert_close(found["present.2.key"], present[2][0], **CLOSE)
    torch.testing.assert_close(found["present.2.value"], present[2][1], **CLOSE)


@pytest.mark.parametrize("kind", ["rms", "adaptive", "steps"])
def test_an_expert_attends_to_the_prefix_and_crosses_to_it(kind: str) -> None:
    """Blocks "self" and "cross" in turn; positions count on from the prefix, those of crossing queries from zero."""
    prefix = TowerSpec(12, (LayerSpec(2, 2, 6, 8), LayerSpec(6, 3, 6, 8), LayerSpec(2, 1, 6, 8)))
    layers = (LayerSpec(4, 2, 6, 24), LayerSpec(4, 2, 6, 24, "cross"), LayerSpec(3, 1, 6, 10))
    tower = TowerSpec(WIDTH, layers, eps=1e-6, norm=kind)  # type: ignore[arg-type]
    steps, length, seen = 4, 5, 7
    module = Wrapped(decoder=Decoder(tower, prefix, steps))
    x = random(1, length, WIDTH)
    condition = torch.tensor([2]) if kind == "steps" else random(1, steps, seed=3)
    past = [
        tuple(random(1, layer.kv_heads, seen, 6, seed=9 + i + j) for j in (0, 1))
        for i, layer in enumerate(prefix.layers)
    ]
    allowed = torch.cat([torch.zeros(length, seen), causal_mask(length)], 1)
    with torch.no_grad():
        positions = torch.arange(seen, seen + length)
        expected, _ = module.decoder(x, allowed, positions, past, None if kind == "rms" else condition)

    def define(b: Builder, x: str, condition: str | None = None, **keys: str) -> dict[str, str]:
        places = blocks.positions(b, b.size(keys["key.0"], 2), b.size(x, 1))
        columns = blocks.positions(b, None, b.add(b.size(keys["key.0"], 2), b.size(x, 1)))
        crossing = blocks.rotary_tables(b, blocks.positions(b, None, b.size(x, 1)), tower)
        mask = blocks.causal_mask(b, places, columns)
        around = GraphContext(blocks.rotary_tables(b, places, tower), mask, crossing, condition)
        for i, layer in enumerate(tower.layers):
            known = keys[f"key.{i}"], keys[f"value.{i}"]
            x, _ = blocks.decoder_block(b, x, f"decoder.layers.{i}", tower, layer, around, known)
        return {"y": blocks.norm(b, x, "decoder.norm", tower, condition)[0]}

    given = {"x": x} | ({} if kind == "rms" else {"condition": condition})
    for i, (key, value) in enumerate(past):
        given |= {f"key.{i}": key, f"value.{i}": value}
    torch.testing.assert_close(run(module, given, define)["y"], expected, **CLOSE)


def test_nothing_is_computed_that_nobody_reads() -> None:
    """Which onnxruntime 1.18 pays for with wrong results from the second run on."""
    module = Wrapped(decoder=Decoder(LLAMA))
    b = OnnxRuntimeBuilder(module.weights(), FORMATS["fp32"])
    x = b.input("x", "float32", (1, WIDTH))
    b.linear(x, "decoder.layers.0.attention.q")
    b.output("y", b.linear(x, "decoder.layers.0.mlp.up"), "float32", (1, 24))
    graph = b.model("block").graph
    assert [node.op_type for node in graph.node] == ["MatMul"]
    assert [tensor.name for tensor in graph.initializer] == ["decoder.layers.0.mlp.up.weight"]


VIT = TowerSpec(WIDTH, (LayerSpec(2, 2, 10, 33), LayerSpec(0, 0, 10, 5), LayerSpec(1, 1, 10, 0)), eps=1e-6)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("activation", ["gelu", "gelu-tanh", "relu", "silu"])
@pytest.mark.parametrize(("extra", "scaled"), [(0, False), (3, True)])
def test_vision_transformer(activation: str, extra: int, scaled: bool) -> None:
    tower = replace(VIT, activation=activation)  # type: ignore[arg-type]
    module = Wrapped(vision=VisionTransformer(tower, (2, 3), (4,), extra=extra, scaled=scaled, normed=False))
    pixels = random(2, 8, 12, 3)
    with torch.no_grad():
        expected = module.vision(pixels).flatten(1, 2)

    def define(b: Builder, x: str) -> dict[str, str]:
        return {"y": blocks.vision_transformer(b, x, "vision", tower, (2, 3), 4, extra, scaled)}

    torch.testing.assert_close(run(module, {"x": pixels}, define)["y"], expected, **CLOSE)
