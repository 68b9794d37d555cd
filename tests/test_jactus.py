"""JACTUS and the statistics it stands on, against float64 numpy and scipy."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from zoo import ARCHS, batch, build, loss, losses, outputs

import recombine
from recombine import Balf, Jactus, Svd
from recombine.core.account import layer_report, stored_in_targets
from recombine.core.calibration import Inputs, Stats, collect
from recombine.core.method import Site
from recombine.core.rewrite import find_sites
from recombine.layers import DeltaLinear, FactoredLinear
from recombine.linalg import orthonormal_union, shrink
from recombine.models import roles
from recombine.models.fused_qkv import layer_at

EVERYTHING = {"inputs", "magnitudes", "outputs", "cross", "fisher"}


@pytest.mark.parametrize("arch", ARCHS)
def test_statistics_are_the_plain_means(arch):
    """Against the activations and gradients of every layer, kept whole; padding left out; the model as it was."""
    model, method = build(arch).double().train(), Svd(targets=("q", "k", "v", "o", "up", "down", "gate?"))
    roles.split_fused(model, method.targets)
    sites = find_sites(model, method)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    batches = [batch(model, seed=s) for s in (3, 4)]
    if isinstance(batches[0], torch.Tensor):
        batches = [x.double() for x in batches]
    stats = collect(model, sites, lambda: (loss(model, x) for x in batches), EVERYTHING)
    assert all(m.training for m in model.modules()) and all(p.grad is None for p in model.parameters())
    assert all(p.requires_grad and torch.equal(p, before[n]) for n, p in model.named_parameters())

    model.eval()
    for site in sites[:: 3 if len(sites) > 9 else 1]:
        xs, gs, fisher = [], [], []
        for x in batches:
            seen = []
            hook = site.module.register_forward_hook(lambda m, a, y, seen=seen: seen.append((a[0], y)))
            value = loss(model, x)
            hook.remove()
            grads = torch.autograd.grad(value, [y for _, y in seen] + [site.module.weight])
            for (source, _), grad in zip(seen, grads, strict=False):
                keep = slice(None)
                if isinstance(x, dict) and source.shape[:2] == x["attention_mask"].shape:
                    keep = x["attention_mask"].bool()
                xs.append(source[keep].detach().flatten(0, -2).numpy())
                gs.append(grad[keep].flatten(0, -2).numpy())
            fisher.append(grads[-1].square().numpy())
        x, g, one = np.concatenate(xs), np.concatenate(gs), stats[site.name]
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-12 * abs(np.asarray(b)).max())  # noqa: E731
        close(one.inputs.xx.numpy(), x.T @ x / len(x))
        close(one.inputs.absolute.numpy(), abs(x).mean(0))
        close(one.inputs.x4, ((x**2).sum(1) ** 2).mean())
        close(one.gg.numpy(), g.T @ g / len(g))
        close(one.gx.numpy(), g.T @ x / len(x))
        close(one.fisher.numpy(), np.mean(fisher, 0))


def test_layers_that_read_the_same_tensor_share_their_statistics():
    model = build("tiny_llama")
    sites = find_sites(model, Svd(targets=("q", "k", "v", "gate", "up", "down")))
    stats = collect(model, sites, losses(model), {"inputs"})
    q, k, v = (stats[f"model.layers.1.self_attn.{r}_proj"].inputs for r in "qkv")
    gate, up, down = (stats[f"model.layers.1.mlp.{r}_proj"].inputs for r in ("gate", "up", "down"))
    assert q is k and k is v and gate is up and up is not down and q is not gate


def test_no_batches_are_refused():
    with pytest.raises(recombine.UsageError, match="no batch"):
        recombine.apply(build("tiny_vit"), Jactus(), losses=lambda: iter(()))
    with pytest.raises(recombine.UsageError, match="losses="):
        recombine.apply(build("tiny_vit"), Jactus())


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 40), st.integers(0, 99))
def test_shrinkage_is_ledoit_and_wolfs(d, n, seed):
    """rho = min(b^2, d^2) / d^2, b^2 = sum_t |x_t x_t^T - C|^2 / n^2, d^2 = |C - mu I|^2 (their Lemma 3.2-3.4)."""
    x = np.random.default_rng(seed).standard_normal((n, d)) * np.logspace(0, -2, d)
    c = x.T @ x / n
    mu = np.trace(c) / d
    spread = ((c - mu * np.eye(d)) ** 2).sum()
    noise = min(sum(((np.outer(t, t) - c) ** 2).sum() for t in x) / n**2, spread)
    rho = noise / spread if spread > 0 else 1.0
    expected = (1 - rho) * c + rho * mu * np.eye(d)
    got = shrink(torch.tensor(c), float(((x**2).sum(1) ** 2).mean()), n)
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-9 * max(mu, 1e-300))


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 10), st.integers(0, 10), st.integers(0, 12), st.booleans(), st.integers(0, 99))
def test_the_union_spans_both_and_is_orthonormal(d, a, b, inside, seed):
    g = torch.Generator().manual_seed(seed)
    base = torch.linalg.qr(torch.randn(d, min(a, d), generator=g, dtype=torch.float64))[0]
    extra = torch.randn(d, min(b, d), generator=g, dtype=torch.float64)
    if inside and base.shape[1]:  # nearly the same directions again
        extra = base[:, :1] @ extra[:1] * 1.0 + 1e-9 * extra
    union = orthonormal_union(base, extra)
    assert torch.allclose(union.T @ union, torch.eye(union.shape[1], dtype=torch.float64), atol=1e-10)
    assert torch.equal(union[:, : base.shape[1]], base) and union.shape[1] <= d
    assert (extra - union @ (union.T @ extra)).norm() <= 1e-5 * (1 + extra.norm())


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
