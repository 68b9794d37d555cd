"""Weights in few bits: the arithmetic, what is counted, and what stages do with it."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from recombine import Crisp, apply, count
from recombine.layers.quantize import quantize
from zoo import build


@pytest.mark.parametrize("bits", [2, 8, 16])
def test_rounding_is_that_of_integers(bits):
    torch.manual_seed(0)
    layer = nn.Linear(7, 5)
    with torch.no_grad():
        layer.weight[2] = 0  # a row without a scale
    before, bias = layer.weight.detach().double().numpy(), layer.bias.clone()
    quantize([layer], bits)
    top = 2 ** (bits - 1) - 1
    scale = np.abs(before).max(1, keepdims=True) / top
    scale[2] = 1
    wanted = np.rint(before / scale) * scale
    assert np.allclose(layer.weight.detach().numpy(), wanted, atol=2e-7) and torch.equal(layer.bias, bias)
    assert np.abs(wanted - before).max() <= scale.max() / 2 + 1e-7
    assert layer.weight.stored_bytes == -(-35 * bits // 8) + 4 * 5
    again = copy.deepcopy(layer)
    quantize([again], bits)
    assert torch.allclose(again.weight, layer.weight, atol=1e-7)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("dtype", "size"), [(torch.float16, 1e-5), (torch.float16, 1), (torch.bfloat16, 1)])
def test_half_precision_is_rounded_by_float32_scales(dtype, size, bits):
    torch.manual_seed(0)
    layer = nn.Linear(200, 64).to(dtype)
    layer.weight.data = (torch.randn(64, 200) * size).to(dtype)
    before, top = layer.weight.detach().double(), 2 ** (bits - 1) - 1
    scale = before.abs().amax(1, keepdim=True) / top
    wanted = ((before / scale).round() * scale).to(dtype)
    quantize([layer], bits)
    lost, least = ((w.double() - before).norm() for w in (layer.weight.detach(), wanted))
    assert layer.weight.dtype == dtype and lost <= 1.01 * least


def test_a_shared_basis_is_rounded_and_counted_once():
    model = apply(build("tiny_vit"), Crisp(chunk=16))
    layers = [model.get_submodule(name) for name in model.recombined.targets]
    before, matrices = count(model), {id(p): p for x in layers for p in x.parameters() if p.ndim > 1}.values()
    assert len(matrices) < 2 * len(layers)  # two layers, one basis
    quantize(layers, 8)
    after = count(model)
    assert after.bytes_weights == before.bytes_weights - sum(3 * p.numel() - 4 * len(p) for p in matrices)
    assert after.stored == before.stored
