"""BALF: how it spends a budget over the layers."""

from dataclasses import replace

import numpy as np
import pytest
from torch import nn

import recombine
from helpers import ALL
from helpers.weighted import group_of, learnt
from recombine import Balf
from recombine.methods.svd.low_rank import dims
from zoo import ARCHS, build, losses


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5, 0.8, 0.95])
def test_balf_spends_the_budget_better_than_one_ratio_for_all(arch, ratio):
    method, sites = learnt(Balf(targets=ALL, ratio=ratio), build(arch))
    stored, dense = method.sizes(sites)[0], sum(site.module.weight.numel() for site in sites)
    assert stored <= ratio * dense and stored > ratio * dense - max(sum(dims(site)) for site in sites)
    options_ = [method.options(site) for site in sites]
    for site, (costs, lost) in zip(sites, options_, strict=True):
        m, n = dims(site)
        assert costs[-2] < costs[-1] == m * n and costs[-2] + m + n >= m * n  # no rank that dense would beat
        assert (lost.diff() <= 0).all() and (costs.diff() > 0).all() and lost[-1] == 0 and lost[0] <= 1
    ranks = method.ranks(sites)
    lost = sum(x[-1 if k is None else k - 1].item() for (_, x), k in zip(options_, ranks, strict=True))
    even = [max(1, int(ratio * m * n / (m + n))) for m, n in map(dims, sites)]
    assert lost <= sum(x[k - 1].item() for (_, x), k in zip(options_, even, strict=True))


def test_balf_unfilled_takes_every_choice_at_one_price():
    """As the paper's code: some price makes all choices the best of their layers, and the rest is not spent."""
    learned, sites = learnt(Balf(targets=ALL), build("tiny_vit"))
    dense, unspent = sum(site.module.weight.numel() for site in sites), 0
    for ratio in (0.1, 0.25, 0.4, 0.5, 0.6, 0.8):
        method, filled = (replace(learned, ratio=ratio, fill=fill) for fill in (False, True))
        for one in (method, filled):
            one.kept = learned.kept
        low, high = 0.0, float("inf")
        for site, k in zip(sites, method.ranks(sites), strict=True):
            costs, lost = (t.numpy() for t in method.options(site))
            i = len(costs) - 1 if k is None else k - 1
            slopes = (lost[i] - lost) / np.where(costs == costs[i], 1, costs - costs[i])  # gain per weight
            low, high = max(low, slopes[i + 1 :].max(initial=0)), min(high, slopes[:i].min(initial=np.inf))
        assert low <= high * (1 + 1e-9)
        stored = [one.sizes(sites)[0] for one in (method, filled)]
        assert stored[0] <= stored[1] <= ratio * dense
        unspent += stored[1] - stored[0]
    assert unspent > 0


def test_balf_leaves_layers_dense_as_they_are():
    model = build("tiny_vit")
    before = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    recombine.apply(model, Balf(targets=ALL, ratio=0.9), losses=losses(model))
    after = {name: model.get_submodule(name) for name in model.recombined.targets}
    same = [name for name, layer in after.items() if layer is before[name]]
    assert 0 < len(same) < len(after)
    assert all(after[name].weight.requires_grad is False for name in same)


def test_balf_of_a_layer_without_outputs():
    model, sites, stats, _ = group_of([(8, 8)] * 2, "qk", "random", "random", 0)
    sites[0].module.weight.data.zero_()
    method = Balf(ratio=0.6)
    method.stats = stats
    assert method.ranks(sites)[1] is None or method.ranks(sites)[1] > method.ranks(sites)[0] == 1
    method.rewrite(model, sites)
    assert all(p.isfinite().all() for p in model.parameters())
