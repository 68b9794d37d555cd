"""A factored layer whose right factor is the identity in k columns is the same layer."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.matrices import KINDS, matrix
from recombine.layers import FactoredLinear
from recombine.layers.factored import pivoted


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 12), st.integers(2, 12), KINDS, st.integers(0, 99), st.data())
def test_pivoted_rows_are_the_same_rows(k, n, kind, seed, data):
    """right = B [I R] in float64, also where right lacks rank; R stays small."""
    k = min(k, n)
    right = matrix(kind, k, n, seed)
    rest, order = pivoted(right)
    assert sorted(order.tolist()) == list(range(n)) and rest.shape == (k, n - k)
    again = right[:, order[:k]] @ torch.cat([torch.eye(k, dtype=right.dtype), rest], 1)
    assert torch.allclose(again, right[:, order], rtol=0, atol=1e-12 * right.abs().max())
    assert not rest.numel() or rest.abs().max() < 8


@pytest.mark.parametrize("m, n, k", [(48, 200, 24), (200, 48, 24), (96, 96, 90), (64, 64, 1)])
def test_a_pivoted_layer_is_the_same_in_fewer_weights(m, n, k):
    """To 1e-6 in float32, and k^2 weights fewer; both ways of applying it agree, and the FLOPs are those counted."""
    from torch.utils.flop_counter import FlopCounterMode

    torch.manual_seed(0)
    layer = FactoredLinear(torch.randn(m, k), torch.randn(k, n), bias=torch.randn(m))
    x = torch.randn(7, n)
    with torch.no_grad():
        before, weight = layer.factored_forward(x), layer.dense_weight()
        rest, order = pivoted(layer.right)
        layer.pivot(torch.nn.Parameter(rest.float(), requires_grad=False), order)
        assert (layer.factored_forward(x) - before).norm() <= 1e-6 * before.norm()
        assert (layer.dense_weight() - weight).norm() <= 1e-6 * weight.norm()
        assert sum(p.numel() for p in layer.parameters()) == k * (m + n - k) + m
        assert layer.in_features == n and layer.out_features == m
        layer.train()
        structured, dense, build = layer.flops(7, False)
        for cost, run in ((structured, lambda: layer.factored_forward(x)), (build, layer.dense_weight)):
            with FlopCounterMode(display=False) as counted:
                run()
            assert counted.get_total_flops() == 2 * cost
        assert structured == 7 * k * (m + n - k) and dense == 7 * m * n
        empty = FactoredLinear.empty(**layer.spec())
        empty.load_state_dict(layer.state_dict())
        assert torch.equal(empty(x), layer(x))
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
