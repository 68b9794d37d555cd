"""factor=pivot: the same layers in fewer weights, for every method that has it."""

import copy
from dataclasses import replace

import pytest
import torch

import recombine
from helpers import ALL, SPLIT, refusal
from helpers.weighted import learnt
from recombine import Balf, BasisSharing, Cersa, Dfjr, DobiSvd, Fwsvd, Jactus, KfacSvd, Svd, SvdLlm
from recombine.core import rewrite
from recombine.core.account import flops
from recombine.core.budget import Budget
from recombine.core.memory import Memory
from recombine.layers import FactoredLinear
from zoo import ARCHS, batch, build, losses, outputs, train

METHODS = {
    "svd": Svd(targets=ALL, rank=9),
    "svd_llm": SvdLlm(targets=ALL, rank=9),
    "svd_llm refit": SvdLlm(targets=ALL, rank=9, refit=True),
    "fwsvd": Fwsvd(targets=SPLIT, rank=9),
    "kfac_svd": KfacSvd(targets=ALL, rank=9),
    "basis_sharing": BasisSharing(rank=9),
    "basis_sharing refit": BasisSharing(rank=9, refit=True),
    "dfjr": Dfjr(rank=9),
}


def applied(arch, method, budget=None):
    model = build(arch)
    return recombine.apply(model, copy.copy(method), budget, losses(model)).eval()


def weights_of(model):
    """Weights in the target layers, a shared one once."""
    layers = [model.get_submodule(name) for name in model.recombined.targets]
    return sum({id(p): p.numel() for layer in layers for k, p in layer.named_parameters() if k != "bias"}.values())


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_the_same_model_in_fewer_weights(name, arch):
    """At one rank: the same outputs and weights to float32, and k^2 weights less for each right factor."""
    plain, pivot = (applied(arch, replace(METHODS[name], factor=factor)) for factor in ("plain", "pivot"))
    x = batch(plain)
    a, b = outputs(plain, x), outputs(pivot, x)
    assert (a - b).norm() <= 2e-6 * a.norm()
    rights = {}
    for layer in plain.recombined.targets:
        one, other = plain.get_submodule(layer), pivot.get_submodule(layer)
        assert (one.dense_weight() - other.dense_weight()).norm() <= 2e-6 * one.dense_weight().norm()
        rights[id(one.right)] = one.rank
        assert other.rank == one.rank and sorted(other.order.tolist()) == list(range(one.in_features))
    assert weights_of(plain) - weights_of(pivot) == sum(k * k for k in rights.values())


def test_flops_fall_with_the_weights():
    """At every rank below the full one the layers cost less than dense ones, also where two whole factors would not."""
    found, x = {}, batch(build("tiny_vit"))[:1].repeat(64, 1, 1, 1)  # of few tokens tiny layers take a built weight
    for factor in ("plain", "pivot"):
        model = applied("tiny_vit", Svd(targets=ALL, rank=20, factor=factor))
        dense = flops(build("tiny_vit"), x)
        found[factor] = flops(model, x)
    assert found["pivot"] < found["plain"] < dense


@pytest.mark.parametrize("arch", ["tiny_vit", "tiny_llama"])
@pytest.mark.parametrize("method", [Svd(), SvdLlm(), BasisSharing(), DobiSvd(steps=3)])
@pytest.mark.parametrize("share", [30, 50, 80])
def test_a_budget_buys_more_rank(method, arch, share):
    ranks = {}
    for factor in ("plain", "pivot"):
        model = applied(arch, replace(method, factor=factor), f"retained_{share}")
        account = recombine.count(model)
        assert account.retained <= share / 100 and account.retained > share / 100 - 0.1
        ranks[factor] = sum(model.get_submodule(name).rank for name in model.recombined.targets)
    assert ranks["pivot"] > ranks["plain"]


@pytest.mark.parametrize("arch", ["tiny_vit", "tiny_llama"])
@pytest.mark.parametrize("method", [Balf(), KfacSvd(allocation="error"), SvdLlm(allocation="share")])
@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.9])
def test_one_budget_loses_less(method, arch, ratio):
    """The budget is met, and what all layers lose together is less than with whole factors."""
    lost = {}
    for factor in ("plain", "pivot"):
        found, sites = learnt(replace(method, factor=factor, ratio=ratio), build(arch))
        ranks, relative = found.ranks(sites), getattr(found, "allocation", "share") == "share"
        assert found.sizes(sites)[0] <= ratio * sum(site.module.weight.numel() for site in sites)
        options = [found.options(site, relative) for site in sites]
        assert all((costs.diff() > 0).all() and (losses_.diff() <= 0).all() for costs, losses_ in options)
        lost[factor] = sum(x[-1 if k is None else k - 1].item() for (_, x), k in zip(options, ranks, strict=True))
    assert lost["pivot"] < lost["plain"]


def test_rank_and_weights_are_the_closed_form():
    """For every share: k is the largest whole number with k (m + n - k) <= share m n, and at least 1."""
    for m, n in ((48, 48), (48, 192), (7, 3), (144, 48)):
        for i in range(1, 1001):
            share = i / 1000
            k = Svd(factor="pivot").whole_rank(m, n, share)
            best = [j for j in range(1, min(m, n) + 1) if j * (m + n - j) <= share * m * n]
            assert k == max(best, default=1)


@pytest.mark.parametrize("method", [Svd(ratio=1.0), Svd(energy=1.0), SvdLlm(rank=48), BasisSharing(ratio=1.0)])
def test_a_full_rank_stays_dense(method):
    model = build("tiny_vit")
    x = batch(model)
    with torch.no_grad():
        before = outputs(model.eval(), x)
        recombine.apply(model, replace(method, factor="pivot"), losses=losses(model))
        left = [name for name in model.recombined.targets if not isinstance(model.get_submodule(name), FactoredLinear)]
        assert left
        if method.rank is None:
            assert len(left) == len(model.recombined.targets) and recombine.count(model).retained == 1
            assert torch.allclose(outputs(model, x), before, atol=1e-5)


@pytest.mark.parametrize("method", [Svd(), BasisSharing(whiten=False)])
def test_a_distillation_step_trains_what_is_stored(method):
    """Gradients reach left and right of every layer, and the same layers, merged before or after, are the same."""
    model = applied("tiny_llama", replace(method, factor="pivot"))
    recombine.train_only(model, method.distillation_parameters(model))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    x = batch(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    outputs(model.train(), x).square().mean().backward()
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    layers = [name for name in model.recombined.targets if isinstance(model.get_submodule(name), FactoredLinear)]
    assert all(f"{name}.left" in moved for name in layers)
    assert any(f"{name}.right" in moved for name in layers)
    with torch.no_grad():
        y = outputs(model.eval(), x)
        assert torch.allclose(outputs(recombine.merge(model), x), y, atol=2e-5)


def test_bad_factors_are_one_line():
    assert "method.factor='lu'" in refusal(recombine.apply, build("tiny_vit"), Svd(factor="lu"))
    why = refusal(recombine.apply, build("tiny_vit"), Svd(factor="pivot", train_core=True))
    assert "method.factor='pivot'" in why and "train_core" in why


CORES = {
    "jactus": Jactus(ratio=0.8, dense="none"),
    "jactus deployed": Jactus(ratio=0.6, counted="deployed"),
    "cersa": Cersa(targets=ALL, rank=9),
    "cersa by energy": Cersa(targets=SPLIT, alpha=0.9),
    "cersa whole": Cersa(targets=SPLIT, alpha=1.0),
}


@pytest.mark.parametrize("arch", ["tiny_vit", "tiny_llama"])
@pytest.mark.parametrize("name", CORES)
def test_a_core_trains_between_pivots(name, arch, tmp_path):
    """Its layers start as they do without pivots and store k^2 less at one rank; the core trains."""
    plain, pivot = (applied(arch, replace(CORES[name], factor=factor)) for factor in ("plain", "pivot"))
    x = batch(plain)
    layers = [pivot.get_submodule(name) for name in pivot.recombined.targets]
    factored = [layer for layer in layers if isinstance(layer, FactoredLinear)]
    for layer in factored:
        assert layer.order is not None and layer.core.requires_grad and not layer.left.requires_grad
        assert layer.core.shape == (layer.rank, layer.rank)
    if "jactus" not in name:  # the budget of jactus buys more rank
        a, b = outputs(plain, x).detach(), outputs(pivot, x).detach()
        assert (a - b).norm() <= 1e-5 * a.norm()
        assert weights_of(plain) - weights_of(pivot) == sum(layer.rank**2 for layer in factored)
    method = replace(CORES[name], factor="pivot")
    model = build(arch)
    sites = rewrite.prepare(model, method, Budget(), losses(model), Memory())
    stored, trained = method.sizes(sites)
    assert stored == weights_of(pivot)
    assert trained == sum(p.numel() for layer in layers for p in layer.parameters() if p.requires_grad)
    history = train(pivot.train())
    assert history[-1] < history[0]
    y = outputs(pivot.eval(), x)
    path = recombine.save(pivot, tmp_path / "m", whole=False)
    assert torch.equal(outputs(recombine.load(path, build(arch)).eval(), x), y)
    assert torch.allclose(outputs(recombine.merge(pivot), x), y, atol=1e-4)


def test_the_ranks_of_jactus_grow():
    plain, pivot = (applied("tiny_vit", replace(CORES["jactus"], factor=factor)) for factor in ("plain", "pivot"))
    ranks = [
        sum(
            model.get_submodule(name).rank
            for name in model.recombined.targets
            if isinstance(model.get_submodule(name), FactoredLinear)
        )
        for model in (plain, pivot)
    ]
    dense = plain.recombined.dense
    assert ranks[1] > ranks[0] and weights_of(pivot) <= 0.8 * dense


@pytest.mark.parametrize("fields", [{"beta": 0.5}, {"trained_share": 0.5}, {"core": "array"}])
def test_a_core_that_holds_some_of_what_is_kept_has_no_pivots(fields):
    with pytest.raises(recombine.UsageError, match="method.factor='pivot': mixes the kept directions") as error:
        recombine.apply(build("tiny_vit"), Cersa(factor="pivot", **fields))
    assert "\n" not in str(error.value)
