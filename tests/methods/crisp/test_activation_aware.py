"""CRISP's activation-aware fit: both of its steps are least squares."""

import itertools
import math

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F

import recombine
from helpers.groups import M, N, S, group, randn
from recombine import Crisp
from recombine.linalg import shrink
from recombine.methods.crisp import activation_aware
from recombine.methods.crisp.activation_aware import fit_outputs, solve_basis, solve_mixer
from recombine.methods.crisp.closed_form import truncate, ungate
from zoo import batch, build, losses, outputs


def inputs(count=2, tokens=40, seed=50):
    """X (tokens, N) with correlated, uneven columns, and E[x x^T], for every layer."""
    xs = [
        randn(tokens, N, seed=seed + i) @ (randn(N, N, seed=seed + 10 + i) * torch.logspace(0, -2, N))
        for i in range(count)
    ]
    return xs, [x.T @ x / tokens for x in xs]


def output_error(weights, built, moments):
    """sum_i E|W_i x - W'_i x|^2 / E|W_i x|^2"""
    each = [((w - b) @ c * (w - b)).sum() / (w @ c * w).sum() for w, b, c in zip(weights, built, moments, strict=True)]
    return sum(each).item()


def compose(basis, gated):
    """W'_i (M, N) from B (M N / S, r) and [G_1 ... G_g] (r, g S)."""
    return [(basis.reshape(-1, basis.shape[-1]) @ g).reshape(M, N) for g in gated.split(S, 1)]


def test_both_steps_are_least_squares(monkeypatch):
    """Against numpy's lstsq on the tokens themselves; the mixer's after enough conjugate gradients."""
    weights, (xs, moments), r, q = group()[0], inputs(), 3, N // S
    gated, shares = [randn(r, S, seed=i) for i in (1, 2)], [0.7, 2.0]
    outs = [w @ c for w, c in zip(weights, moments, strict=True)]
    basis = solve_basis(outs, moments, shares, gated)
    features = [(x.reshape(-1, q, S) @ g.T).flatten(1) for x, g in zip(xs, gated, strict=True)]  # (tokens, q r)
    a = np.concatenate([math.sqrt(p) * f.numpy() for p, f in zip(shares, features, strict=True)])
    y = np.concatenate([math.sqrt(p) * (x @ w.T).numpy() for p, x, w in zip(shares, xs, weights, strict=True)])
    assert np.allclose(basis.flatten(1).numpy().T, np.linalg.lstsq(a, y, rcond=None)[0], atol=1e-8)

    monkeypatch.setattr(activation_aware, "STEPS", 60)
    columns = torch.einsum("maf,tae->tmfe", basis, xs[0].view(-1, q, S)).reshape(-1, r * S)  # d y_m / d G_fe
    oracle = np.linalg.lstsq(columns.numpy(), (xs[0] @ weights[0].T).reshape(-1).numpy(), rcond=None)[0]
    solved = solve_mixer(basis, outs[0], moments[0], gated[0])
    assert np.allclose(solved.reshape(-1).numpy(), oracle, atol=1e-6 * np.abs(oracle).max())


def test_alternations_only_help_and_beat_the_truncation():
    weights, m = group()
    moments = inputs()[1]
    errors = [output_error(weights, compose(*fit_outputs(weights, moments, 4, S, k)), moments) for k in (0, 1, 3, 10)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0]
    assert errors[0] < 0.7 * output_error(weights, compose(*truncate(m, 4)), moments)


def test_a_chunk_as_wide_as_the_layer_is_the_whitened_svd():
    (w,), (c,) = group(1)[0], inputs(1)[1]
    basis, gated = fit_outputs([w], [c], 3, N, 0)
    s = scipy.linalg.svdvals((w @ torch.linalg.cholesky(c)).numpy())
    error = output_error([w], [basis @ gated], [c])
    assert error == pytest.approx((s[3:] ** 2).sum() / (s**2).sum(), rel=1e-6)


def test_aware_is_exact_at_full_size():
    weights, _ = group()
    moments = [shrink(c, 0.0, 40, floor=0.01) for c in inputs()[1]]
    for built, w in zip(compose(*fit_outputs(weights, moments, 2 * S, S, 2)), weights, strict=True):
        assert torch.allclose(built, w, atol=1e-9)


def test_aware_bears_degenerate_weights_and_inputs():
    x = randn(9, N)
    for w, c in itertools.product(
        (torch.zeros(M, N).double(), torch.ones(M, N).double(), 1e-12 * randn(M, N), torch.eye(M, N).double()),
        (torch.zeros(N, N).double(), x[:1].T @ x[:1], x.T @ x, torch.eye(N).double(), 1e9 * x[:2].T @ x[:2]),
    ):
        c = shrink(c, c.diagonal().sum().square(), 9, floor=0.01)
        basis, gated = fit_outputs([w, randn(M, N)], [c, x.T @ x + torch.eye(N)], 3, S, 3)
        assert basis.isfinite().all() and gated.isfinite().all()
        b, a = ungate(basis, gated, "silu", "svd")
        assert b.isfinite().all() and torch.allclose(b @ F.silu(a), basis @ gated, atol=1e-8)


def test_aware_changes_outputs_less():
    def distance(**fields):
        model = build("tiny_vit")
        x, before = batch(model), outputs(model, batch(model))
        recombine.apply(model, Crisp(chunk=16, **fields), "retained_60", losses(model))
        return (outputs(model, x) - before).square().mean().item()

    assert distance() == distance(fit="aware", group_size=1)  # the default under a budget
    assert distance(fit="aware") < 0.6 * distance(fit="closed")
