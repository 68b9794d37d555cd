"""JACTUS against float64 numpy and scipy."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import recombine
from recombine import Balf, Jactus
from recombine.core.account import layer_report, stored_in_targets
from recombine.core.calibration import Inputs, Stats, collect
from recombine.core.method import Site
from recombine.core.rewrite import find_sites
from recombine.layers import DeltaLinear, FactoredLinear
from recombine.linalg import shrink
from recombine.models import roles
from recombine.models.roles import layer_at
from zoo import batch, build, losses, outputs

KINDS = ("random", "zero", "rank one", "equal")


def site_of(m: int, n: int, kind: str, seed: int, tokens: int = 30):
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(m, n, generator=g, dtype=torch.float64)
    w = {"random": w, "zero": 0 * w, "rank one": w[:, :1] @ w[:1], "equal": torch.ones_like(w)}[kind]
    x = torch.randn(tokens, n, generator=g, dtype=torch.float64) * torch.logspace(0, -1, n, dtype=torch.float64)
    y = torch.randn(tokens, m, generator=g, dtype=torch.float64) * torch.logspace(0, -1, m, dtype=torch.float64)
    linear = nn.Linear(n, m, dtype=torch.float64)
    linear.weight.data = w
    inputs = Inputs(tokens, x.T @ x / tokens, x.square().sum(1).square().mean().item())
    stats = Stats(inputs, tokens, 1, y.T @ y / tokens, y.square().sum(1).square().mean().item(), y.T @ x / tokens)
    return Site("layer", "up", linear), stats


def covariances(stats: Stats, floor: float):
    """C_x and C_g as JACTUS weighs with them, by numpy."""
    pairs = (stats.inputs.xx, stats.inputs.x4, stats.inputs.tokens), (stats.gg, stats.g4, stats.tokens)
    found = [shrink(c, fourth, count, floor).numpy() for c, fourth, count in pairs]
    return [c / np.trace(c) * len(c) for c in found]


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 9), st.integers(2, 9), st.sampled_from(KINDS), st.integers(0, 99), st.data())
def test_full_unions_give_the_weighted_optimum(m, n, kind, seed, data):
    """alpha = beta = gamma = 1: |C_g^1/2 (W - W_k) C_x^1/2|_F is the tail of the whitened spectrum, for every k."""
    site, stats = site_of(m, n, kind, seed)
    method = Jactus(alpha=1, beta=1, gamma=1, dense="none")
    method.stats = {"layer": stats}
    cx, cg = covariances(stats, method.floor)
    root_x, root_g = (scipy.linalg.sqrtm(c).real for c in (cx, cg))
    w = site.module.weight.detach().numpy()
    spectrum = scipy.linalg.svdvals(root_g @ w @ root_x)
    k = data.draw(st.integers(1, min(m, n)))
    layer = method.layer(site, k)
    found = np.linalg.norm(root_g @ (w - layer.dense_weight().detach().numpy()) @ root_x)
    assert abs(found - np.sqrt((spectrum[k:] ** 2).sum())) <= 1e-8 * max(spectrum[0], 1e-9)
    np.testing.assert_allclose(method.whole(site).gains.sqrt().numpy(), spectrum, atol=1e-8 * max(spectrum[0], 1e-9))
    for q in (layer.left, layer.right.T):  # the frozen factors are orthonormal: the core carries all
        np.testing.assert_allclose((q.T @ q).detach().numpy(), np.eye(k), atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(st.integers(3, 9), st.integers(3, 9), st.sampled_from(KINDS), st.integers(0, 99), st.floats(0.3, 0.99))
def test_smaller_unions_are_optimal_inside_themselves(m, n, kind, seed, share):
    """W_k = Q_L S Q_R^T: no other rank-k S inside the union does better, and the union's error is never below."""
    site, stats = site_of(m, n, kind, seed)
    errors = []
    for shares in (share, 1.0):
        method = Jactus(alpha=shares, beta=shares, gamma=shares, dense="none")
        method.stats = {"layer": stats}
        cx, cg = covariances(stats, method.floor)
        k = min(2, len(method.whole(site).inner))
        delta = site.module.weight.detach().numpy() - method.layer(site, k).dense_weight().detach().numpy()
        errors.append(np.trace(cg @ delta @ cx @ delta.T))
        assert np.isfinite(delta).all()
    assert errors[0] >= errors[1] - 1e-9 * max(1.0, errors[1])


def subspace(matrix: np.ndarray, share: float, squared: bool) -> np.ndarray:
    """The left singular vectors of a matrix that hold the share of its (squared) singular values."""
    u, s, _ = np.linalg.svd(matrix, full_matrices=False)
    held = np.cumsum(s**2 if squared else s)
    return u[:, : min(int((held < share * held[-1]).sum()) + 1, len(s))]


@settings(max_examples=40, deadline=None)
@given(st.integers(3, 24), st.integers(3, 24), st.integers(0, 99), st.sampled_from([0.3, 0.7, 0.95, 0.99]), st.data())
def test_unions_give_the_optimum_of_the_docstring(m, n, seed, share, data):
    """T and W_k as union.py writes them, with orthonormal bases of both unions and an SVD, by numpy and scipy."""
    site, stats = site_of(m, n, "random", seed, tokens=60)
    method = Jactus(alpha=share, beta=share, gamma=share, dense="none")
    method.stats = {"layer": stats}
    cx, cg = covariances(stats, method.floor)
    w = site.module.weight.detach().numpy()
    ql = scipy.linalg.orth(np.hstack([subspace(w, share, True), subspace(stats.gg.numpy(), share, False)]))
    qr = scipy.linalg.orth(np.hstack([subspace(w.T, share, True), subspace(stats.inputs.xx.numpy(), share, False)]))
    rl, rr = np.linalg.cholesky(ql.T @ cg @ ql).T, np.linalg.cholesky(qr.T @ cx @ qr).T
    p, s, rh = np.linalg.svd(np.linalg.inv(rl).T @ ql.T @ cg @ w @ cx @ qr @ np.linalg.inv(rr), full_matrices=False)
    k = data.draw(st.integers(1, len(s)))
    expected = ql @ np.linalg.inv(rl) @ p[:, :k] * s[:k] @ rh[:k] @ np.linalg.inv(rr).T @ qr.T
    whole = method.whole(site)
    np.testing.assert_allclose(whole.gains[: len(s)].sqrt().numpy(), s, atol=1e-8 * s[0])
    assert len(whole.right) == len(s)
    if k == len(s) or s[k - 1] - s[k] > 1e-3 * s[0]:  # else the optimum is not unique
        found = method.layer(site, k).dense_weight().detach().numpy()
        np.testing.assert_allclose(found, expected, atol=1e-8 * np.linalg.norm(w))


def test_no_eigenvector_is_computed_where_the_unions_are_whole(monkeypatch):
    """With the defaults and covariances of many directions: one eigendecomposition, of the smaller Gram matrix."""
    site, stats = site_of(48, 40, "random", 0, tokens=4000)
    seen, eigh = [], torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda a: seen.append(len(a)) or eigh(a))
    method = Jactus(dense="none")
    method.stats = {"layer": stats}
    method.whole(site)
    assert seen == [40]


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 9), st.integers(2, 9), st.sampled_from(KINDS), st.integers(0, 99), st.data())
def test_without_gradients_full_unions_are_the_whitened_svd(m, n, kind, seed, data):
    """sensitivity=none: |(W - W_k) C_x^1/2|_F is the tail of W C_x^1/2, and no statistic of outputs is read."""
    site, stats = site_of(m, n, kind, seed)
    method = Jactus(alpha=1, sensitivity="none", dense="none")
    assert method.statistics_needed() == {"inputs"}
    cx, _ = covariances(stats, method.floor)
    method.stats = {"layer": Stats(stats.inputs)}
    root, w = scipy.linalg.sqrtm(cx).real, site.module.weight.detach().numpy()
    u, s, _ = scipy.linalg.svd(w @ root)
    k = data.draw(st.integers(1, min(m, n)))
    delta = w - method.layer(site, k).dense_weight().detach().numpy()
    scale = max(s[0], 1e-9)
    assert abs(np.linalg.norm(delta @ root) - np.sqrt((s[k:] ** 2).sum())) <= 1e-8 * scale
    if k == len(s) or s[k - 1] - s[k] > 1e-3 * scale:  # else the optimum is not unique
        np.testing.assert_allclose(w - delta, u[:, :k] @ u[:, :k].T @ w, atol=1e-7 * max(np.linalg.norm(w), 1e-9))


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.7, 0.95])
def test_without_gradients_relative_shares_are_spent_as_balf_spends_them(ratio):
    sites, stats = [], {}
    for i, (m, n) in enumerate([(8, 8), (12, 9), (9, 14), (10, 10), (20, 6)]):
        site, one = site_of(m, n, "random", i)
        site.module.weight.data *= 10.0 ** (i - 2)
        sites.append(site._replace(name=f"l{i}"))
        stats[f"l{i}"] = Stats(Inputs(10**12, one.inputs.xx, one.inputs.x4))  # so many tokens that nothing is shrunk
    ours = Jactus(ratio=ratio, alpha=1, sensitivity="none", relative=True, allocation="lagrangian",
                  counted="deployed", dense="frozen", floor=1e-12)  # fmt: skip
    theirs = Balf(ratio=ratio)
    ours.stats = theirs.stats = stats
    assert ours.ranks(sites) == theirs.ranks(sites)
    absolute = replace(ours, relative=False)
    absolute.stats = stats
    assert absolute.ranks(sites) != ours.ranks(sites)


def test_gradients_turn_the_subspace():
    """With gain=weight+grad and a large eta the kept directions follow the gradient; with eta=0 nothing changes."""
    site, stats = site_of(8, 6, "random", 0)
    plain, same, turned = (Jactus(dense="none", gain=g, eta=e) for g, e in
                           (("weight", 0.3), ("weight+grad", 0.0), ("weight+grad", 50.0)))  # fmt: skip
    built = []
    for method in (plain, same, turned):
        method.stats = {"layer": stats}
        built.append(method.layer(site, 2))
    weights = [layer.dense_weight().detach() for layer in built]
    assert torch.allclose(weights[0], weights[1], atol=1e-9) and not torch.allclose(weights[0], weights[2], atol=1e-2)
    caught = [(layer.left.T @ stats.gx @ layer.right.T).norm() for layer in built]  # of the gradient, by the core
    assert caught[2] > caught[0]


@pytest.mark.parametrize("dense", ["frozen", "full", "core_on_top_k", "none"])
@pytest.mark.parametrize("allocation", ["greedy", "lagrangian"])
@pytest.mark.parametrize("counted", ["stored", "deployed"])
def test_budget_is_met_and_dense_layers_follow_their_rule(dense, allocation, counted):
    model = build("tiny_vit")
    original = copy.deepcopy(model)
    method = Jactus(dense=dense, allocation=allocation, counted=counted, top_k=3)
    recombine.apply(model, method, "retained_80", losses(model))
    rows, dense_weights = layer_report(model), model.recombined.dense
    stored = trained = 0
    for row in rows:
        layer, (m, n) = model.get_submodule(row["name"]), row["shape"]
        if isinstance(layer, FactoredLinear):
            k = row["rank"]
            stored += k * (m + n) + (k * k if counted == "stored" else 0)
            trained += k * k
        else:
            core = 3 if dense == "core_on_top_k" else 0
            stored += m * n + (core * (m + n) + core * core if counted == "stored" else 0)
            trained += m * n if dense == "full" else core * core
            assert isinstance(layer, DeltaLinear if core else nn.Linear) and dense != "none"
            assert torch.equal(layer.weight, layer_at(original, row["name"]).weight)  # dense is exact
    assert stored <= 0.8 * dense_weights and recombine.count(model).trained_without_head == trained
    if counted == "stored":
        assert recombine.count(model).retained == pytest.approx(stored / dense_weights)
    assert stored > 0.75 * dense_weights  # and used


def test_more_budget_is_less_loss():
    base = build("tiny_deberta")
    x, errors = batch(base), []
    for word in ("retained_40", "retained_60", "retained_80"):
        model = copy.deepcopy(base)
        recombine.apply(model, Jactus(dense="none"), word, losses(model))
        errors.append((outputs(model, x) - outputs(base, x)).norm().item())
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("shares", [0.3, 0.99])
@pytest.mark.parametrize("counted", ["stored", "deployed"])
def test_counts_hold_where_the_union_is_narrower_than_the_core(shares, counted):
    model = build("tiny_vit")
    method = Jactus(alpha=shares, beta=shares, gamma=shares, counted=counted, ratio=0.9)
    recombine.apply(model, method, losses=losses(model))
    fresh = build("tiny_vit")
    again = copy.copy(method)
    again.__post_init__()
    roles.split_fused(fresh, again.targets)
    sites = find_sites(fresh, again)
    again.stats = collect(fresh, sites, losses(fresh), again.statistics_needed())
    assert again.sizes(sites) == (
        stored_in_targets(model),
        recombine.count(model).trained_without_head,
    )


def test_a_refused_method_leaves_a_recombined_model_whole():
    model = recombine.apply(build("tiny_vit"), recombine.Full(targets=("q", "k", "v")))
    with pytest.raises(recombine.UsageError):
        recombine.apply(model, recombine.Cersa(targets=("q",), alpha=3.0))
    assert recombine.count(model).retained == 1.0
    recombine.merge(model)
