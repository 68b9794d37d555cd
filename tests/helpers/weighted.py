"""Weights and inputs of every kind, and layers with the statistics of them."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import strategies as st
from torch import nn

from recombine.core.calibration import Inputs, Stats
from recombine.core.method import Site
from recombine.core.rewrite import calibrate, find_sites
from recombine.models import roles
from zoo import batch, losses

WEIGHTS = st.sampled_from(["random", "zero", "rank one", "equal", "orthogonal", "tiny", "huge"])
INPUTS = st.sampled_from(["random", "zero", "rank one", "few", "orthogonal", "decaying", "one dead"])


def weight_of(kind: str, m: int, n: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((m, n))
    q = np.linalg.qr(rng.standard_normal((max(m, n), max(m, n))))[0]
    return {
        "random": w,
        "zero": 0 * w,
        "rank one": w[:, :1] @ w[:1],
        "equal": np.ones_like(w),
        "orthogonal": q[:m, :n],  # duplicate singular values
        "tiny": 1e-12 * w,
        "huge": 1e12 * w,
    }[kind]


def inputs_of(kind: str, n: int, seed: int, tokens: int = 30) -> np.ndarray:
    """(n, tokens)"""
    rng = np.random.default_rng(seed + 1000)
    x = rng.standard_normal((n, tokens))
    return {
        "random": x,
        "zero": 0 * x,
        "rank one": x[:, :1] @ x[:1],
        "few": x[:, : max(1, n // 2)].repeat(2, 1),  # fewer samples than inputs
        "orthogonal": np.linalg.qr(rng.standard_normal((30, 30)))[0][:n],
        "decaying": np.logspace(0, -6, n)[:, None] * x,
        "one dead": np.where(np.arange(n)[:, None] == 0, 0, x),
    }[kind]


def tail(matrix: np.ndarray, rank: int) -> float:
    return float(np.sqrt((scipy.linalg.svdvals(matrix)[rank:] ** 2).sum()))


def agrees(error: float, optimum: float, scale: float) -> None:
    """To 1e-8 of the optimum, unless that is lost in float64 beside `scale`, the product of the norms."""
    assert np.isfinite(error)
    assert abs(error**2 - optimum**2) <= 1e-12 * scale**2
    if optimum > 1e-3 * scale:
        assert error == pytest.approx(optimum, rel=1e-8)


def double_losses(model):
    """`losses` on images in the model's precision."""
    from zoo import loss

    def run():
        for i in range(4):
            x = batch(model, seed=10 + i)
            yield loss(model, x.double() if isinstance(x, torch.Tensor) else x)

    return run


def group_of(shapes, role, kind, inputs, seed):
    """A model of one linear layer per shape, as sites, with the statistics of explicit inputs."""
    model, sites, stats, xs = nn.Module(), [], {}, []
    for i, (m, n) in enumerate(shapes):
        linear = nn.Linear(n, m, dtype=torch.float64)
        linear.weight.data = torch.from_numpy(weight_of(kind, m, n, seed + i))
        model.add_module(f"l{i}", linear)
        sites.append(Site(f"l{i}", role[i], linear))
        xs.append(inputs_of(inputs, n, seed + i))
        stats[f"l{i}"] = Stats(inputs=Inputs(30, torch.from_numpy(xs[-1] @ xs[-1].T / 30)))
    return model, sites, stats, xs


def learnt(method, model):
    """(a copy of the method that has seen the data, the sites)."""
    method = replace(method)
    run = copy.deepcopy(model)
    roles.split_fused(run, method.targets)
    sites = find_sites(run, method)
    calibrate(run, method, sites, losses(run), method.statistics_needed())
    method.after_budget(run, sites, losses(run))
    return method, sites
