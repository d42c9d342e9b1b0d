"""The graphs of ACT: ACTPolicy.encode_image and .decode, with frozen batch norms folded into the convolutions."""

from __future__ import annotations

import numpy as np
import torch

from rlrc.artifact import LayerSpec, PolicySpec, TowerSpec
from rlrc.compressor.models.act import ACTGeometry, sinusoidal
from rlrc.compressor.models.meta import on_meta
from rlrc.compressor.models.nn.resnet import ConvNorm, FrozenBatchNorm, ResidualBlock, ResNet, feature_size
from rlrc.compressor.models.policy import parse_geometry
from rlrc.exporters.graphs.builder import Builder

Towers = dict[str, TowerSpec]


# Pictures


def vision(b: Builder, policy: PolicySpec, towers: Towers) -> None:
    """``pixels`` (cameras, H, W, 3) -> ``image_tokens`` (cameras, N, width); any H and W if the cameras' differ."""
    g, width = parse_geometry(ACTGeometry, policy), towers["encoder"].width
    sizes = {(camera.height, camera.width) for camera in policy.cameras}
    size, tokens = ("height", "width"), "image_tokens"
    if len(sizes) == 1:
        (size,) = sizes  # type: ignore[assignment]
        tokens = int(np.prod(feature_size(*size, g.dilated)))  # type: ignore[arg-type, assignment]
    x = b.transpose(b.input("pixels", "float32", ("cameras", *size, 3)), 0, 3, 1, 2)
    with on_meta():
        net = ResNet(g.stem, g.blocks, g.widths, g.outputs, g.bottleneck, g.dilated)
    x = b.op("Relu", conv_norm(b, x, "vision.stem", net.stem))
    x = b.op("MaxPool", x, kernel_shape=(3, 3), strides=(2, 2), pads=(1, 1, 1, 1))
    for name, block in net.stages.named_modules(prefix="vision.stages"):
        if isinstance(block, ResidualBlock):
            x = residual_block(b, x, name, block)
    rows = b.reshape(b.transpose(x, 0, 2, 3, 1), 0, -1, g.outputs[-1])
    b.output("image_tokens", b.linear(rows, "projector", bias=True), "float32", ("cameras", tokens, width))


def residual_block(b: Builder, x: str, name: str, block: ResidualBlock) -> str:
    y = x
    for i, convolution in enumerate(block.convs):
        assert isinstance(convolution, ConvNorm)
        y = conv_norm(b, b.op("Relu", y) if i else y, f"{name}.convs.{i}", convolution)
    return b.op("Relu", b.add(y, x if block.skip is None else conv_norm(b, x, f"{name}.skip", block.skip)))


def conv_norm(b: Builder, x: str, name: str, module: ConvNorm) -> str:
    """ConvNorm: the norm's scale is multiplied into the weights at load; its bias becomes the convolution's."""
    conv, norm = module.conv, FrozenBatchNorm(module.conv.out_channels, module.norm.eps)
    norm.load_state_dict({part: torch.from_numpy(b.weights.array(f"{name}.norm.{part}")) for part in norm.state_dict()})
    scale, bias = (y.numpy() for y in norm.affine())
    assert not isinstance(conv.padding, str)
    shape = {"kernel_shape": conv.kernel_size, "strides": conv.stride, "dilations": conv.dilation}
    return b.convolution(x, f"{name}.conv", scale, bias, **shape, pads=conv.padding * 2)


# Transformers


def decoder(b: Builder, policy: PolicySpec, towers: Towers) -> None:
    """``image_tokens`` (batch, N, width) of all cameras, ``state`` (batch, S) -> ``actions`` (batch, horizon, dim)."""
    geometry, action, width = parse_geometry(ACTGeometry, policy), policy.action, towers["encoder"].width
    grids = [feature_size(camera.height, camera.width, geometry.dilated) for camera in policy.cameras]
    count = sum(rows * columns for rows, columns in grids) if len(set(grids)) == 1 else "image_tokens"
    image_tokens = b.input("image_tokens", "float32", ("batch", count, width))
    parts = [b.repeat(b.reshape(b.weight("latent"), 1, width), batch_of=image_tokens)]
    if policy.state is not None:
        state = b.input("state", "float32", ("batch", geometry.state + geometry.environment))
        start = 0
        for name, numbers in (("state", geometry.state), ("environment", geometry.environment)):
            if numbers:
                values = b.slice(state, start, start + numbers)
                parts.append(b.linear(b.reshape(values, 0, 1, numbers), name, bias=True))
                start += numbers
    tables = [sinusoidal(rows, columns, width).numpy() for rows, columns in grids]
    position = b.concat(b.weight("position"), *map(b.constant, tables), axis=0)
    memory = transformer(b, b.concat(*parts, image_tokens), "encoder", towers, geometry.pre_norm, position)
    chunk = b.repeat(b.op("ConstantOfShape", b.integers(action.horizon, width)), batch_of=image_tokens)
    query = b.weight("query")
    x = transformer(b, chunk, "decoder", towers, geometry.pre_norm, query, memory, b.add(memory, position))
    b.output("actions", b.linear(x, "head", bias=True), "float32", ("batch", action.horizon, action.dim))


def transformer(
    b: Builder,
    x: str,
    name: str,
    towers: Towers,
    pre_norm: bool,
    position: str,
    memory: str | None = None,
    memory_key: str | None = None,
) -> str:
    """Transformer: x (batch, T, width), positions (T, width); cross blocks attend to the memory (batch, S, width)."""
    tower = towers[name]
    for i, layer in enumerate(tower.layers):
        block = f"{name}.layers.{i}"

        def normalise(x: str, norm: str, block: str = block) -> str:
            return b.layer_norm(x, f"{block}.{norm}", tower.eps)

        y = normalise(x, "norm1") if pre_norm else x
        query = b.add(y, position)
        if layer.kind == "cross":
            assert memory is not None
            assert memory_key is not None
            y = attention(b, query, memory_key, memory, f"{block}.attention", layer)
        else:
            y = attention(b, query, query, y, f"{block}.attention", layer)
        x = b.add(x, y)
        x = x if pre_norm else normalise(x, "norm1")
        if layer.mlp:
            y = normalise(x, "norm2") if pre_norm else x
            y = b.linear_activated(y, f"{block}.mlp.up", tower.activation or "relu")
            x = b.add(x, b.linear(y, f"{block}.mlp.down", bias=True))
            x = x if pre_norm else normalise(x, "norm2")
    return b.layer_norm(x, f"{name}.norm", tower.eps) if pre_norm or name == "decoder" else x


def attention(b: Builder, query: str, key: str, value: str, name: str, layer: LayerSpec) -> str:
    if not layer.heads:
        return b.weight(f"{name}.o.bias")
    q, k, v = (b.linear(x, f"{name}.{part}", bias=True) for x, part in ((query, "q"), (key, "k"), (value, "v")))
    return b.linear(b.attention(q, k, v, layer.heads, layer.heads, layer.head_dim), f"{name}.o", bias=True)


GRAPHS = {"vision": vision, "decoder": decoder}
