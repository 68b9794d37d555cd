"""The tensor mathematics against float64 oracles."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from recombine import linalg
from recombine.linalg import (
    GELU_MIN,
    SILU_MIN,
    energy_rank,
    gelu_inverse,
    orthonormal_union,
    shrink,
    silu_inverse,
    spectrum_exceeds,
    svd,
)


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


def spectra(n: int, kind: str) -> torch.Tensor:
    s = torch.arange(1, n + 1, dtype=torch.float64)
    return {
        "flat": 1 + 0 * s,
        "slow": s**-0.5,
        "fast": s**-2,
        "ill": torch.logspace(0, -14, n, dtype=torch.float64),
        "steps": torch.where(s < n / 3, 1.0, torch.where(s < n / 2, 1e-5, 1e-9)),
        "rank one": 1.0 * (s == 1),
        "zero": 0 * s,
    }[kind]


def matrix(m: int, n: int, kind: str, seed: int) -> torch.Tensor:
    g, k = torch.Generator().manual_seed(seed), min(m, n)
    u, v = (torch.linalg.qr(torch.randn(d, k, generator=g, dtype=torch.float64))[0] for d in (m, n))
    return u * spectra(k, kind) @ v.T


KINDS = ["flat", "slow", "fast", "ill", "steps", "rank one", "zero"]


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from(KINDS), st.integers(0, 99),
       st.sampled_from([torch.float32, torch.float64]), st.data())  # fmt: skip
def test_the_svd_leaves_no_more_than_lapacks(m, n, kind, seed, finder, data):
    """At every rank, by every algorithm: SMALL is set to 0, so that none of these sizes is left to LAPACK."""
    w, k = matrix(m, n, kind, seed), data.draw(st.integers(1, min(m, n)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linalg, "SMALL", 0)
        patch.setattr(linalg, "THIN", data.draw(st.sampled_from([1, 4, 100])))
        u, s, vh = svd(w, k, finder)
    best = torch.linalg.svd(w, full_matrices=False)
    eye, scale = torch.eye(k, dtype=torch.float64), best[1][0]
    assert (w - u * s @ vh).norm() <= 1.001 * best[1][k:].norm() + 1e-12 * scale
    assert (u.T @ u - eye).norm() <= 1e-9 and (vh @ vh.T - eye).norm() <= 1e-8
    assert (s.diff() <= 1e-10 * scale).all() and (s <= best[1][:k] + 1e-12 * scale).all()
    assert u.dtype == s.dtype == vh.dtype == torch.float64


@pytest.mark.parametrize("finder", [torch.float32, torch.float64])
@pytest.mark.parametrize("m, n, k", [(600, 700, 8), (700, 530, 30), (520, 1200, 260), (600, 600, 600)])
def test_the_svd_of_large_matrices(m, n, k, finder):
    """Weights drawn as networks draw them, whose flat spectra are the hardest to iterate on, and decaying ones."""
    for w in (torch.randn(m, n, generator=torch.Generator().manual_seed(0)), matrix(m, n, "slow", 1)):
        state, s = torch.get_rng_state(), torch.linalg.svdvals(w.double())
        u, found, vh = svd(w, k, finder)
        assert (w - u * found @ vh).norm() <= 1.001 * s[k:].norm() + 1e-12 * s[0]
        assert torch.equal(torch.get_rng_state(), state)  # no draw of anyone else moves


def test_float32_finds_subspaces_only_where_it_is_good_enough(monkeypatch):
    """On a flat spectrum float32 finds the subspace; on a decaying one float64 does, and the answer is as good."""
    seen, eigh = [], torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda a: seen.append((a.dtype, len(a))) or eigh(a))
    svd(torch.randn(530, 540, generator=torch.Generator().manual_seed(0)), 200, torch.float32)
    assert seen == [(torch.float32, 530), (torch.float64, 200)]
    seen.clear()
    svd(matrix(530, 540, "fast", 0), 200, torch.float32)
    assert seen == [(torch.float32, 530), (torch.float64, 530)]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30), st.sampled_from(KINDS), st.integers(0, 99), st.floats(0, 1), st.data())
def test_what_a_spectrum_surely_holds(d, kind, seed, share, data):
    """True only where it is true; and a flat spectrum is recognised."""
    m, top = matrix(d, d, kind, seed), data.draw(st.integers(0, d - 1))
    m = m @ m.T
    tail = torch.linalg.eigvalsh(m).flip(0)[top:].sum()
    assert not spectrum_exceeds(m, top, share) or tail > share * m.trace() - 1e-12
    flat = torch.eye(40, dtype=torch.float64)
    assert spectrum_exceeds(flat, 20, 0.05) and not spectrum_exceeds(flat, 20, 0.6)
