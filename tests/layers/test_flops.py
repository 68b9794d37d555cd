"""The layers' FLOPs are those that torch counts."""

import pytest
import torch

from recombine.layers import FactoredLinear, SharedBasisLinear


@pytest.mark.parametrize("tokens", [1, 10, 10000])
def test_flops_rule_counts_what_runs(tokens):
    """The rule's numbers are those torch counts (2 FLOPs a multiplication), forward, both ways."""
    from torch.utils.flop_counter import FlopCounterMode

    layers = [
        FactoredLinear(torch.randn(12, 5), torch.randn(5, 8), torch.randn(5, 5)),
        SharedBasisLinear(torch.randn(24, 3), torch.randn(3, 4), 8),
    ]
    x = torch.randn(tokens, 8)
    for layer in layers:
        layer.train()
        structured, dense, build = layer.flops(tokens, False)
        with FlopCounterMode(display=False) as counted:
            layer.factored_forward(x)
        inner = 25 * tokens if isinstance(layer, FactoredLinear) else 0  # folded away in eval
        assert counted.get_total_flops() == 2 * (structured + inner)
        with FlopCounterMode(display=False) as counted:
            torch.nn.functional.linear(x, layer.dense_weight())
        assert counted.get_total_flops() == 2 * (dense + build)


@pytest.mark.parametrize("rank, tokens, built", [(95, 999, True), (80, 999, False), (80, 20, True), (80, 21, False)])
def test_near_the_dense_count_and_for_few_tokens_the_weight_is_built_without_gradients(rank, tokens, built):
    """At rank 80 a token takes 40,000 multiplications or 1.1 x 32,000: 100,000 more are worth 20.8 tokens."""
    from torch.utils.flop_counter import FlopCounterMode

    layer = FactoredLinear(torch.randn(200, rank) / 14, torch.randn(rank, 200) / 14, bias=torch.randn(200))
    x = torch.randn(tokens, 200)
    structured, dense, _ = layer.flops(tokens, False)
    for training in (True, False):
        layer.train(training)
        with torch.set_grad_enabled(training):
            layer(x)  # keeps what is built
            with FlopCounterMode(display=False) as counted:
                y = layer(x)
        assert counted.get_total_flops() == 2 * (dense if built and not training else structured)
        assert torch.allclose(y, x @ layer.weight.T + layer.bias, atol=1e-5)
