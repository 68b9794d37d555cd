"""The shared-basis layer applies its map, with every gate in every place."""

import itertools
import math

import numpy as np
import pytest
import torch

from helpers.groups import M, N, S, randn
from recombine.layers import SharedBasisLinear
from recombine.layers.shared_basis import GATES, PLACEMENTS


@pytest.mark.parametrize("gate, placement", list(itertools.product(GATES, PLACEMENTS)))
def test_layer_applies_the_map(gate, placement):
    """Against numpy, both forwards and their gradients, and through a checkpoint's spec."""
    basis, mixer, x = randn(M * N // S, 3), randn(3, S, seed=1), randn(5, 7, N, seed=2)
    phi = {
        "silu": lambda a: a / (1 + np.exp(-a)),
        "gelu": lambda a: a * (1 + np.vectorize(math.erf)(a / 2**0.5)) / 2,
        "relu": lambda a: np.maximum(a, 0),
        "none": lambda a: a,
    }[gate]
    b, a = basis.numpy(), mixer.numpy()
    weight = {"pre": b @ phi(a), "post": phi(b @ a), "temp": phi(b) @ a}[placement].reshape(M, N)
    layer = SharedBasisLinear(basis, mixer, N, gate, None, placement).requires_grad_(True)
    assert np.allclose(layer.dense_weight().detach().numpy(), weight)
    results = []
    for cheap in (0, 1):
        layer.flops = lambda tokens, train, c=cheap: (c, 1 - c, 0)
        y = layer(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), [layer.basis, layer.mixer])))
        with torch.no_grad():
            assert torch.allclose(layer.eval()(x), y) and torch.allclose(layer(x), y)
        layer.train()
    assert np.allclose(results[0][0].detach().numpy(), x.numpy() @ weight.T)
    assert all(torch.allclose(p, q) for p, q in zip(*results, strict=True))
    again = SharedBasisLinear.empty(**layer.spec()).double()
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again.dense_weight(), layer.dense_weight())


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("tokens", [1, 1000])
def test_flops_rule_counts_what_runs(placement, tokens):
    from torch.utils.flop_counter import FlopCounterMode

    layer, x = SharedBasisLinear(torch.randn(24, 3), torch.randn(3, 4), 8, placement=placement), torch.randn(tokens, 8)
    with FlopCounterMode(display=False) as counted:
        layer.factored_forward(x)
    assert counted.get_total_flops() == 2 * layer.flops(tokens, False)[0]
