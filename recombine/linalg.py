"""Tensor maths shared by two or more methods. Everything is computed in float64 and returned in it."""

import torch
import torch.nn.functional as F
from torch import Tensor

SILU_ARGMIN = -1.2784645427610738  # SiLU falls to its minimum here and rises ever after
SILU_MIN = -0.2784645427610738  # silu(SILU_ARGMIN): SiLU has no inverse below


def svd(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD in float64: (m, n) -> U (m, N), s (N,) descending, Vh (N, n) with N = min(m, n)."""
    return torch.linalg.svd(weight.detach().double(), full_matrices=False)


def energy_rank(s: Tensor, fraction: float) -> int:
    """Smallest k with sum(s[:k]^2) >= fraction * sum(s^2) (CERSA Eq. 2); at least 1, and all of s at 1.0."""
    if fraction >= 1:
        return len(s)
    energy = s.double().square().cumsum(0)
    return min(int((energy < fraction * energy[-1]).sum()) + 1, len(s))


def silu_inverse(y: Tensor, steps: int = 80) -> Tensor:
    """x >= SILU_ARGMIN with silu(x) = y, elementwise, by bisection in float64. Needs y >= SILU_MIN."""
    y = y.double()
    assert y.numel() == 0 or y.min() >= SILU_MIN, f"SiLU never reaches {y.min():.4f}"
    low, high = torch.full_like(y, SILU_ARGMIN), y.clamp(min=0) + 1  # silu(y + 1) > y for all y >= 0
    for _ in range(steps):
        mid = (low + high) / 2
        below = F.silu(mid) < y
        low, high = torch.where(below, mid, low), torch.where(below, high, mid)
    return (low + high) / 2
