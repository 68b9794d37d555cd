"""The tensor mathematics against float64 oracles."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from recombine.linalg import GELU_MIN, SILU_MIN, energy_rank, gelu_inverse, orthonormal_union, shrink, silu_inverse


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


def test_gelu_inverse_is_exact():
    y = torch.cat([torch.linspace(-0.1699, 0.2, 5001), torch.arange(30)]).double()
    y = torch.cat([y, torch.tensor([GELU_MIN], dtype=torch.float64)])
    x = gelu_inverse(y)
    assert torch.allclose(F.gelu(x), y, atol=1e-12) and x.min() >= -0.7518


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
