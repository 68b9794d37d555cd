"""KFAC-SVD against scipy's two-sided SVD, JACTUS's optimum, and the form of the paper's code."""

from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import recombine
from helpers import ALL, refusal
from helpers.weighted import INPUTS, WEIGHTS, group_of, inputs_of, learnt
from recombine import Balf, KfacSvd, SvdLlm
from recombine.methods.jactus.union import Covariance, union_factors
from recombine.methods.svd.kfac import shrunk
from zoo import ARCHS, build, losses


def one_layer(m, n, kind, inputs, outputs, seed):
    """(site, statistics) of one layer with explicit inputs and gradients."""
    _, (site,), stats, _ = group_of([(m, n)], "o", kind, inputs, seed)
    g = torch.from_numpy(inputs_of(outputs, m, seed + 7))
    stats[site.name].gg = g @ g.T / g.shape[1]
    return site, stats


def weight_at(method, site, stats, k):
    """W_k of the method in float64."""
    method = replace(method, rank=k)
    method.stats = stats
    left, right, s = method.optimum(site)
    assert left.shape[1] == len(right) == k
    return (left @ right).numpy(), s.numpy()


def roots(method, stats):
    """Symmetric roots of what C_g and C_x are shrunk to."""
    found = []
    for c, a in ((stats.gg, method.shrink_outputs), (stats.inputs.xx, method.shrink_inputs)):
        values, vectors = np.linalg.eigh(shrunk(c, a).numpy())
        found.append(vectors * np.sqrt(values.clip(0)) @ vectors.T)
    return found


def test_errors_of_layers_are_sums_over_their_tokens():
    """Swin has fewer in every stage: by a mean the first one would be sixteen times too cheap."""
    site, stats = one_layer(6, 8, "random", "random", "random", 0)
    stats[site.name].tokens, found = 196, {}
    for allocation in ("uniform", "error"):
        method = KfacSvd(allocation=allocation)
        method.stats = stats
        found[allocation] = method.optimum(site)[2].numpy()
    assert np.allclose(found["error"], 14 * found["uniform"])


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), WEIGHTS, INPUTS, INPUTS, st.integers(0, 99), st.data())
def test_the_weight_is_the_two_sided_optimum(m, n, kind, inputs, outputs, seed, data):
    """|C_g^1/2 (W - W_k) C_x^1/2|_F is the tail of the spectrum that the method reports, and scipy's."""
    site, stats = one_layer(m, n, kind, inputs, outputs, seed)
    method = KfacSvd(shrink_inputs=data.draw(st.sampled_from([0.0, 0.1])))
    k = data.draw(st.integers(1, min(m, n)))
    found, s = weight_at(method, site, stats, k)
    left, right = roots(method, stats[site.name])
    w = site.module.weight.detach().numpy()
    wanted = scipy.linalg.svdvals(left @ w @ right)
    scale = np.linalg.norm(left) * np.linalg.norm(w) * np.linalg.norm(right)
    if stats[site.name].gg.any():
        assert np.allclose(s, wanted, atol=1e-7 * scale)
    else:  # without a gradient nothing is lost, and outputs count alike
        assert not s.any()
    assert np.linalg.norm(left @ (w - found) @ right) == pytest.approx(
        np.linalg.norm(wanted[k:]), rel=1e-6, abs=1e-7 * scale
    )


@pytest.mark.parametrize("m, n", [(12, 20), (20, 12), (9, 9)])
def test_it_is_the_optimum_of_jactus_in_the_whole_space(m, n):
    """With the same covariances: the same weight at every rank, and gains that are the squared spectrum."""
    site, stats = one_layer(m, n, "random", "random", "random", 3)
    method = KfacSvd()
    c_g, c_x = shrunk(stats[site.name].gg, 0.3), shrunk(stats[site.name].inputs.xx, 0.1)
    whole = union_factors(site.module.weight.detach(), Covariance(c_x, c_x), Covariance(c_g, c_g), (1, 1, 1), None)
    for k in range(1, min(m, n) + 1):
        found, s = weight_at(method, site, stats, k)
        left, core, right = whole.factors_at(k)
        assert np.linalg.norm(found - (left @ core @ right).numpy()) <= 1e-10 * np.linalg.norm(found)
    assert np.allclose(s**2, whole.gains.numpy(), rtol=1e-10)


def test_the_released_form_loses_more():
    """24 x 40, k = 6, gradients along few directions: compressors.md's example, drawn again."""
    site, stats = one_layer(24, 40, "random", "decaying", "random", 0)
    rng = np.random.default_rng(0)
    q = np.linalg.qr(rng.standard_normal((24, 24)))[0]
    stats[site.name].gg = torch.from_numpy(q @ np.diag(np.logspace(0, -6, 24)) @ q.T)
    method = KfacSvd(shrink_outputs=1e-9, shrink_inputs=0.0)
    left, right = roots(method, stats[site.name])
    w = site.module.weight.detach().numpy()
    lost = lambda found: np.linalg.norm(left @ (w - found) @ right)  # noqa: E731
    best, s = weight_at(method, site, stats, 6)
    released, _ = weight_at(replace(method, left="chol_as_released"), site, stats, 6)
    one_sided, _ = weight_at(SvdLlm(), site, stats, 6)
    assert lost(best) == pytest.approx(np.linalg.norm(s[6:]), rel=1e-6)
    assert lost(best) < 0.5 * lost(one_sided) and lost(best) < 0.5 * lost(released)
    plain = replace(method, shrink_outputs=1.0)  # C_g is a multiple of the identity: nothing is left to tell apart
    other = replace(plain, left="chol_as_released")
    assert np.allclose(weight_at(plain, site, stats, 6)[0], weight_at(other, site, stats, 6)[0])
    assert np.allclose(weight_at(plain, site, stats, 6)[0], one_sided)


@pytest.mark.parametrize("arch", ARCHS)
def test_ranks_by_share_are_those_of_balf(arch):
    built = []
    for method in (Balf(targets=ALL), SvdLlm(targets=ALL, allocation="share")):
        model = build(arch)
        recombine.apply(model, method, "retained_60", losses(model))
        built.append(model)
    for name in built[0].recombined.targets:
        a, b = (model.get_submodule(name) for model in built)
        assert type(a) is type(b) and torch.allclose(a.weight, b.weight, atol=1e-6)


@pytest.mark.parametrize("allocation", ["share", "error"])
@pytest.mark.parametrize("cls", [KfacSvd, SvdLlm])
def test_ranks_by_error_lose_least_in_the_sum(cls, allocation):
    """No exchange of one rank between two layers is better, and the budget is met."""
    method, sites = learnt(cls(targets=ALL, allocation=allocation, ratio=0.4), build("tiny_vit"))
    ranks = method.ranks(sites)
    dense = sum(site.module.weight.numel() for site in sites)
    assert method.sizes(sites)[0] <= 0.4 * dense and len(set(ranks)) > 1
    gains = []
    for site, k in zip(sites, ranks, strict=True):
        s = method.spectrum(site).square() / (method.spectrum(site).square().sum() if allocation == "share" else 1)
        if k is not None and k > 1:
            gains.append((float(s[k - 1]) / sum(site.module.weight.shape), float(s[k]) / sum(site.module.weight.shape)))
    price = sorted(gain for gain, _ in gains)[1]  # `fill` may spend what is left on worse ranks, of one layer at most
    assert all(after <= price * 1.5 for _, after in gains)


@pytest.mark.parametrize(
    "fields",
    [
        {"allocation": "even"},
        {"allocation": "share", "rank": 3},
        {"allocation": "share", "ratio": 1e-4},
        {"left": "lower"},
        {"shrink_outputs": 0.0},
        {"shrink_inputs": 1.5},
    ],
)
def test_bad_fields_are_one_line(fields):
    model = build("tiny_vit")
    name = "ratio" if "ratio" in fields else next(iter(fields))
    assert f"method.{name}=" in refusal(recombine.apply, model, KfacSvd(**fields), losses=losses(model))
