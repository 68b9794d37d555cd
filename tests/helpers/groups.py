"""Groups of layers for CRISP, and the best error of a rank."""

import math

import scipy.linalg
import torch

M, N, S = 12, 16, 4  # a weight and its chunk


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def group(count=2, scale=0.05, seed=0):
    """Weights (M, N) with decaying spectra, at the scale of pretrained ones, and M = [M_1 ... M_g]."""
    weights = [scale * randn(M, N, seed=seed + i) * torch.logspace(0, -1, N) for i in range(count)]
    return weights, torch.cat([w.reshape(-1, S) for w in weights], 1)


def tail(m, rank):
    """The error of the best approximation of that rank (Eckart & Young), as a share of |m|."""
    s = scipy.linalg.svdvals(m.numpy())
    return math.sqrt((s[rank:] ** 2).sum() / (s**2).sum())


def share(built, m):
    return ((built - m).norm() / m.norm()).item()
