"""Layers that compute with weights as they are stored (rlrc.compressor.models.nn.linear)."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlrc.artifact import LayerSpec, TowerSpec
from rlrc.compressor.models.nn.decoder import Decoder
from rlrc.compressor.models.nn.linear import EVERY, Embedding, Linear, receive_gradients, recompute, widen

TOWER = TowerSpec(16, (LayerSpec(2, 2, 8, 32),) * 4)


def layer(dtype: torch.dtype = torch.bfloat16, bias: bool = True) -> Linear:
    torch.manual_seed(0)
    found = Linear(24, 17, bias=bias)
    found.weight.data = found.weight.data.to(dtype)
    return found


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_are_those_of_the_widened_weight(dtype: torch.dtype, bias: bool) -> None:
    narrow, x = layer(dtype, bias), torch.randn(2, 5, 24)
    expected = F.linear(x, narrow.weight.float(), narrow.bias)
    assert torch.equal(narrow(x), expected)
    with torch.no_grad():
        assert torch.equal(narrow(x), expected)


@pytest.mark.parametrize("shape", [(2, 5, 24), (5, 24), (1, 1, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_are_those_of_the_widened_weight_bit_by_bit(shape: tuple[int, ...], bias: bool) -> None:
    narrow, x = layer(bias=bias), torch.randn(shape, requires_grad=True)
    wide = narrow.weight.detach().float().requires_grad_()
    plain_bias = None if narrow.bias is None else narrow.bias.detach().clone().requires_grad_()
    up = torch.randn(*shape[:-1], 17)
    given = [x, wide] + ([] if plain_bias is None else [plain_bias])
    expected = torch.autograd.grad(F.linear(x, wide, plain_bias), given, up)
    taken: list[Tensor] = []
    own = [x] + ([] if narrow.bias is None else [narrow.bias])
    narrow.weight.requires_grad_(False)
    found = torch.autograd.grad(narrow(x), own, up, retain_graph=True)
    with receive_gradients({"it": narrow}, lambda name, gradient: taken.append(gradient)):
        narrow(x).backward(up)
    narrow(x).backward(up)
    assert torch.equal(found[0], expected[0])
    assert len(taken) == 1
    assert torch.equal(taken[0], expected[1])
    assert taken[0].dtype == torch.float32
    assert narrow.weight.grad is None
    if bias:
        torch.testing.assert_close(found[1], expected[2])


@pytest.mark.parametrize("again", [False, True])
def test_the_gradient_is_that_of_all_calls_of_a_layer(again: bool) -> None:
    """Prompts of other lengths go through a decoder one after the other, in one backward pass."""
    torch.manual_seed(0)
    decoder, first, second = Decoder(TOWER), torch.randn(1, 6, TOWER.width), torch.randn(2, 4, TOWER.width)
    name = "layers.1.mlp.up"
    inner: Any = decoder.get_submodule(name)

    def loss() -> Tensor:
        return sum(decoder(x, torch.zeros(x.shape[1], x.shape[1]))[0].square().sum() for x in (first, second))

    (expected,) = torch.autograd.grad(loss(), inner.weight)
    taken: list[Tensor] = []
    decoder.requires_grad_(False)
    with receive_gradients({name: inner}, lambda _, gradient: taken.append(gradient)), recompute(decoder, again):
        loss().backward()
    assert len(taken) == 1
    assert torch.equal(taken[0], expected)


def test_the_graph_keeps_no_widened_weight() -> None:
    narrow, x = layer(), torch.randn(3, 24, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        narrow(x)
    assert {tensor.dtype for tensor in kept if tensor.shape == narrow.weight.shape} == {torch.bfloat16}


def test_an_odd_address_changes_no_bit() -> None:
    """Products of one row differ in the last bits if the weight begins at an address that torch would not allocate."""
    plain, x = layer(torch.float32), torch.randn(1, 24)
    odd = layer(torch.float32)
    odd.weight.data = torch.cat([torch.zeros(2), plain.weight.data.flatten()])[2:].view(17, 24)
    assert torch.equal(odd(x), plain(x))
    with torch.no_grad():
        assert torch.equal(odd(x), plain(x))


def test_large_weights_are_widened_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven outputs at a time, three in the end."""
    narrow, x = layer(), torch.randn(2, 3, 24, requires_grad=True)
    narrow.weight.requires_grad_(False)
    expected = F.linear(x, narrow.weight.float(), narrow.bias)
    (gradient,) = torch.autograd.grad(expected.square().sum(), x)
    widest, copy_ = [0], Tensor.copy_
    monkeypatch.setattr(Tensor, "copy_", lambda to, given: (widest.append(given.numel()), copy_(to, given))[1])
    monkeypatch.setattr("rlrc.compressor.models.nn.linear.PART", 7 * 24)
    found = narrow(x)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found.square().sum(), x)[0], gradient)
    assert max(widest) == 7 * 24
    with torch.no_grad():
        torch.testing.assert_close(narrow(x), expected)


def test_autocast_takes_the_stored_weight() -> None:
    narrow, x = layer(), torch.randn(3, 24)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(narrow(x), F.linear(x.bfloat16(), narrow.weight, narrow.bias))


def with_source(values: Tensor) -> tuple[Linear, list[slice | Tensor]]:
    """A layer that computes this weight, and the rows that it has asked for."""
    computed, reads = layer(torch.float32), list[slice | Tensor]()

    def source(rows: slice | Tensor) -> Tensor:
        reads.append(rows)
        return values[rows]

    computed.weight, computed.source = nn.Parameter(torch.empty(17, 24, device="meta")), source
    return computed, reads


def test_a_source_is_read_whenever_the_layer_computes() -> None:
    values, x = torch.randn(17, 24), torch.randn(3, 24)
    computed, reads = with_source(values)
    assert torch.equal(computed(x), F.linear(x, values, computed.bias))
    computed(x)
    assert reads == [EVERY, EVERY]
    widen(computed)
    assert computed.source is None
    assert torch.equal(computed.weight, values)


def test_a_source_of_a_large_weight_is_read_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven outputs at a time, three in the end; in the backward pass once more."""
    values, x = torch.randn(17, 24), torch.randn(2, 3, 24, requires_grad=True)
    computed, reads = with_source(values)
    monkeypatch.setattr("rlrc.compressor.models.nn.linear.PART", 7 * 24)
    found, expected = computed(x), F.linear(x, values, computed.bias)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(each.square().sum(), x)[0] for each in (found, expected)]
    torch.testing.assert_close(*gradients)
    assert reads == 2 * [slice(0, 7), slice(7, 14), slice(14, 17)]


def test_a_source_goes_where_the_layer_computes() -> None:
    """The meta device stands for an accelerator: the weight is read on the CPU and moved for the product."""
    values = torch.randn(17, 24)
    computed, _ = with_source(values)
    moved = copy.deepcopy(computed).to("meta")
    assert list(dict(moved.named_parameters())) == ["weight", "bias"]
    x = torch.randn(3, 24, device="meta", requires_grad=True)
    moved(x).sum().backward()
    assert x.grad.shape == x.shape
    narrow = computed.to(torch.bfloat16)
    assert (narrow.bias.dtype, narrow.weight.device.type) == (torch.bfloat16, "meta")
    assert torch.equal(narrow(x16 := torch.randn(3, 24).bfloat16()), F.linear(x16, values.bfloat16(), narrow.bias))


def test_an_embedding_asks_its_source_for_the_words_alone() -> None:
    table, reads = Embedding(7, 4), list[Tensor]()
    values = torch.randn(7, 4)

    def source(rows: slice | Tensor) -> Tensor:
        assert isinstance(rows, Tensor)
        reads.append(rows)
        return values[rows]

    table.weight, table.source = nn.Parameter(torch.empty(7, 4, device="meta")), source
    ids = torch.tensor([[3, 0, 3], [1, 1, 6]])
    assert torch.equal(table(ids), values[ids])
    assert [rows.tolist() for rows in reads] == [[3, 0, 3, 1, 1, 6]]


def test_embeddings_widen_their_rows() -> None:
    table = Embedding(7, 4)
    table.weight.data = table.weight.data.bfloat16()
    ids = torch.tensor([[3, 0]])
    assert torch.equal(table(ids), table.weight.data.float()[ids])
    assert table(ids).dtype == torch.float32
    assert copy.deepcopy(table).to(torch.bfloat16)(ids).dtype == torch.bfloat16
    assert table(ids).dtype == torch.float32
    assert widen(table).weight.dtype == torch.float32


def test_recomputing_changes_no_gradient_and_keeps_less() -> None:
    torch.manual_seed(0)
    decoder, x = Decoder(TOWER), torch.randn(2, 6, TOWER.width)

    def run(again: bool) -> tuple[list[Tensor], int]:
        kept = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal kept
            kept += tensor.numel()
            return tensor

        with recompute(decoder, again), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = decoder(x)[0].square().sum()
        return list(torch.autograd.grad(loss, list(decoder.parameters()))), kept

    (plain, all_values), (again, few) = run(False), run(True)
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))
    assert few < all_values / 3
    assert not any(getattr(module, "recompute", False) for module in decoder.modules())
