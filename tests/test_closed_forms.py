"""Closed forms against float64 oracles, and the papers' memory accounts."""

import copy

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import recombine
from recombine import Cersa, Crisp, Full, Peft, Svd, Svfit, Svft, models
from recombine.core.method import Site
from recombine.core.rewrite import find_sites
from recombine.layers import FactoredLinear, SharedBasisLinear
from recombine.linalg import SILU_MIN, energy_rank, silu_inverse
from recombine.methods.crisp.closed_form import stack, truncate, ungate

SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 5))
KINDS = st.sampled_from(["random", "zero", "rank one", "equal", "identity-like", "tiny", "huge"])


def matrix(kind: str, m: int, n: int, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(m, n, generator=g, dtype=torch.float64)
    return {
        "random": w,
        "zero": torch.zeros_like(w),
        "rank one": w[:, :1] @ w[:1],
        "equal": torch.ones_like(w),
        "identity-like": torch.eye(m, n, dtype=torch.float64),
        "tiny": 1e-12 * w,
        "huge": 1e12 * w,
    }[kind]


def group_of(kind, m, n, g, seed):
    sites = []
    for i in range(g):
        linear = nn.Linear(n, m, dtype=torch.float64)
        linear.weight.data = matrix(kind, m, n, seed + i)
        sites.append(Site(f"layer{i}", "up", linear))
    return sites


@settings(max_examples=150, deadline=None)
@given(SHAPES, st.sampled_from([1, 2, 4, 8]), st.integers(1, 3), KINDS, st.integers(0, 99), st.data())
def test_crisp_is_the_eckart_young_optimum(shape, chunk, g, kind, seed, data):
    """|M - B G| equals the tail of M's singular values, whatever the gate and the gauge."""
    m, n = 4 * shape[0], 8 * shape[1]
    group = group_of(kind, m, n, g, seed)
    rank = data.draw(st.integers(1, g * chunk))
    stacked = np.concatenate([s.module.weight.detach().numpy().reshape(-1, chunk) for s in group], 1)
    s = scipy.linalg.svdvals(stacked)
    optimum, scale = np.sqrt((s[rank:] ** 2).sum()), max(s[0], 1e-300)
    for gauge in ("svd", "balanced"):
        for gate in ("silu", "none"):
            basis, mixers = ungate(*truncate(stack(group, chunk), rank), gate, gauge)
            layers = [SharedBasisLinear(basis, a, n, gate) for a in mixers.split(chunk, 1)]
            built = np.concatenate([layer.dense_weight().detach().numpy().reshape(-1, chunk) for layer in layers], 1)
            assert np.isfinite(built).all()
            assert abs(np.linalg.norm(stacked - built) - optimum) <= 1e-6 * scale


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), KINDS, st.integers(0, 99), st.data())
def test_svd_is_the_eckart_young_optimum(m, n, kind, seed, data):
    rank = data.draw(st.integers(1, min(m, n)))
    site = group_of(kind, m, n, 1, seed)[0]
    for core in (False, True):
        built = Svd(rank=rank, train_core=core).recombine(site).dense_weight().detach()
        s = torch.linalg.svdvals(site.module.weight.detach())
        error = torch.linalg.norm(built - site.module.weight.detach())
        assert abs(error - s[rank:].square().sum().sqrt()) <= 1e-9 * max(s[0].item(), 1e-300)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 9), st.integers(2, 9), KINDS, st.integers(0, 99), st.floats(0.05, 1), st.floats(0.05, 1))
def test_cersa_keeps_the_energy_with_the_fewest_directions(m, n, kind, seed, a, b):
    site, (beta, alpha) = group_of(kind, m, n, 1, seed)[0], sorted((a, b))
    layer = Cersa(alpha=alpha, beta=beta).recombine(site)
    s = scipy.linalg.svdvals(site.module.weight.detach().numpy())
    energy = np.cumsum(s**2) / max((s**2).sum(), 1e-300)
    if s[0] > 0:
        assert energy[layer.rank - 1] >= alpha - 1e-12
        assert layer.rank == 1 or alpha == 1 or energy[layer.rank - 2] < alpha + 1e-12
        assert energy[len(layer.core) - 1] >= beta - 1e-12
    truncated = Svd(rank=layer.rank).recombine(site).dense_weight()
    assert torch.allclose(layer.dense_weight(), truncated, atol=1e-9 * max(s[0], 1e-300))


def test_silu_inverse_is_exact():
    y = torch.tensor([0.0, SILU_MIN, -0.2, *range(30)], dtype=torch.float64)
    y = torch.cat([torch.linspace(-0.278, 0.2, 5001, dtype=torch.float64), y])
    x = silu_inverse(y)
    assert torch.allclose(torch.nn.functional.silu(x), y, atol=1e-12) and x.min() >= -1.2785


@pytest.mark.parametrize(
    "s, fraction, rank", [([2, 1, 1], 0.5, 1), ([1, 1, 1, 1], 0.5, 2), ([3, 0], 1.0, 2), ([0, 0], 0.9, 1)]
)
def test_energy_rank(s, fraction, rank):
    assert energy_rank(torch.tensor(s, dtype=torch.float64), fraction) == rank


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


@pytest.fixture(scope="module")
def vit_l():
    torch.manual_seed(0)
    return models.build("vit_l16", arch="vit_large_patch16_224", pretrained=False, num_classes=100)


@pytest.mark.parametrize(
    "method, printed",
    [
        (Full(), 4629.8),
        (Peft(targets=("q", "k", "v"), rank=8), 1175.9),
        (Peft(targets=("q", "k", "v"), rank=32), 1229.9),
    ],
    ids=["FT", "LoRA r=8", "LoRA r=32"],
)
def test_memory_equals_cersa_table_14(vit_l, method, printed):
    model = recombine.apply(copy.deepcopy(vit_l), method)
    assert recombine.count(model).memory_mib == pytest.approx(printed, rel=1e-3)


def test_cersa_at_full_rank_takes_the_memory_its_formula_gives(vit_l):
    """q, k, v with all 1024 directions: 2597.7 MiB without a head (the paper prints 2519.6, a mean rank of 996)."""
    model, method = copy.deepcopy(vit_l), Cersa(alpha=1.0)
    model.reset_classifier(0)
    sites = find_sites(model, method)
    method._factors = {site.name: (None, torch.ones(1024), None) for site in sites}  # the ranks need no SVD
    stored, trained = method.sizes(sites)
    rest = sum(p.numel() for p in model.parameters()) - 72 * 1024**2
    assert (4 * (rest + stored) + 12 * trained) / 2**20 == pytest.approx(2597.7, rel=1e-3)


def test_vit_s_counts_equal_crisp():
    """CRISP Sec. 4: ViT-S has 21,233,664 weights in its linear layers; (64, 32) in groups of two trains 98,304."""
    model = models.build("vit_s16", arch="vit_small_patch16_224", pretrained=False, num_classes=1000)
    recombine.apply(model, Crisp())
    account = recombine.count(model)
    assert model.recombined.dense == 21_233_664 and account.trained_without_head == 98_304


def test_cersa_uniform_memory_equals_table_5(vit_l):
    """Rank 287 in q, k and v of every block: printed 1122.5 MiB, of which the head's width (unstated) is the rest."""
    model = recombine.apply(copy.deepcopy(vit_l), FlatCersa(rank=287))
    assert recombine.count(model).memory_mib == pytest.approx(1122.5, rel=1e-3)


class FlatCersa(Cersa):
    """Cersa on a weight whose SVD is known, the identity's, for counts alone."""

    def factors(self, site):
        m, n = site.module.weight.shape
        return torch.eye(m, min(m, n)), torch.ones(min(m, n)), torch.eye(min(m, n), n)


@pytest.mark.parametrize("m, n", [(48, 48), (96, 48), (48, 80)])
@pytest.mark.parametrize(
    "method, weights, trained",
    [  # CERSA Table 1, in floats; its 2mn for SVFit and SVFT holds for square layers: N (m + n) in general
        (Full(), lambda m, n: m * n, lambda m, n: m * n),
        (Cersa(rank=7), lambda m, n: 7 * (m + n) + 49, lambda m, n: 49),
        (Peft(rank=7), lambda m, n: m * n + 7 * (m + n), lambda m, n: 7 * (m + n)),
        (Svfit(rank=7), lambda m, n: min(m, n) * (m + n) + min(m, n), lambda m, n: 7),
        (
            Svft(pattern="banded", band=2),
            lambda m, n: min(m, n) * (m + n) + min(m, n) + svft_entries(min(m, n), 2),
            lambda m, n: svft_entries(min(m, n), 2),
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, recombine.Method) else "",
)
def test_counts_equal_cersa_table_1(method, weights, trained, m, n):
    site = Site("layer", "q", nn.Linear(n, m))
    assert method.sizes([site]) == (weights(m, n), trained(m, n))


def svft_entries(size: int, d: int) -> int:
    return size * (2 * d + 1) - d * (d + 1) + 1  # and the gate
