"""Matrices of every kind, degenerate ones too, and layers made of them."""

import torch
from hypothesis import strategies as st
from torch import nn

from recombine.core.method import Site

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
