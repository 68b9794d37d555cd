"""Tensor mathematics that two or more methods share. Everything is computed and returned in float64."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

SILU_ARGMIN = -1.2784645427610738  # SiLU falls to its minimum here and rises ever after
SILU_MIN = -0.2784645427610738  # silu(SILU_ARGMIN): SiLU has no inverse below
GELU_ARGMIN = -0.7517915246935644  # the same of GELU, x Phi(x)
GELU_MIN = -0.16997120747990366


def svd(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD in float64: (m, n) -> U (m, N), s (N,) descending, Vh (N, n) with N = min(m, n)."""
    return torch.linalg.svd(weight.detach().double(), full_matrices=False)


def energy_rank(s: Tensor, fraction: float) -> int:
    """The smallest k with sum(s[:k]^2) >= fraction * sum(s^2) (CERSA Eq. 2).

    It is at least 1, and len(s) at fraction 1. s (N,) is descending. On the meta device, where s has no values: the
    largest k that any s can have.
    """
    if fraction >= 1:
        return len(s)
    if s.is_meta:
        return math.ceil(fraction * len(s))
    energy = s.double().square().cumsum(0)
    return min(int((energy < fraction * energy[-1]).sum()) + 1, len(s))


def rising_inverse(function: Callable[[Tensor], Tensor], bottom: float, y: Tensor, steps: int = 80) -> Tensor:
    """The x >= bottom with function(x) = y, elementwise, by bisection in float64.

    The function must rise from `bottom` on, with function(y + 1) > y for all y >= 0. y must be at least
    function(bottom), which is asserted.
    """
    y = y.double()
    if y.is_meta:  # has no values to search by
        return torch.empty_like(y)
    low, high = torch.full_like(y, bottom), y.clamp(min=0) + 1
    assert (y >= function(low) - 1e-12).all(), f"the function never reaches {y.min():.4f}"
    for _ in range(steps):
        mid = (low + high) / 2
        below = function(mid) < y
        low, high = torch.where(below, mid, low), torch.where(below, high, mid)
    return (low + high) / 2


def silu_inverse(y: Tensor) -> Tensor:
    """The x >= SILU_ARGMIN with silu(x) = y, elementwise. y must be at least SILU_MIN."""
    return rising_inverse(F.silu, SILU_ARGMIN, y)


def gelu_inverse(y: Tensor) -> Tensor:
    """The x >= GELU_ARGMIN with gelu(x) = y, elementwise. y must be at least GELU_MIN."""
    return rising_inverse(F.gelu, GELU_ARGMIN, y)


def weighted_svd(weight: Tensor, moment: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """U (m, N) and s (N,), N = min(m, n), of the weight (m, n) under an inner product of its inputs.

    W' = U_k U_k^T W has the least tr((W - W') M (W - W')^T) of all matrices of rank k. That least is sum(s[k:]^2).
    With M = E[x x^T] it is the least output error E|W x - W' x|^2. With M = S S^T, W' equals svd_k(W S) S^-1; nothing
    is inverted here, so M may be singular. s is exact to 1e-8 of s[0].

    Args:
        moment: M (n, n), positive semi-definite, or its diagonal (n,); None: the identity.
    """
    weight = weight.detach().double()
    if moment is None or moment.ndim == 1:
        return svd(weight if moment is None else weight * moment.sqrt())[:2]
    q, r = torch.linalg.qr(weight) if len(weight) > weight.shape[1] else (None, weight)  # r (N, n)
    values, vectors = torch.linalg.eigh(r @ moment @ r.T)  # (N, N): S is never formed
    u = vectors.flip(1)
    return u if q is None else q @ u, values.flip(0).clamp(min=0).sqrt()


def project(u: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """left (m, k) and right (k, n) with left right = u u^T W, for an orthonormal u (m, k).

    The two are balanced: |left[:, i]| = |right[i]|, as in U S^1/2 and S^1/2 V^T. Where right is 0, left keeps length 1.
    """
    right = u.T @ weight.detach().double()
    size = right.norm(dim=1).sqrt()
    size = torch.where(size > 0, size, 1.0)
    return u * size, right / size[:, None]


def orthonormal_union(base: Tensor, extra: Tensor, tolerance: float = 1e-6) -> Tensor:
    """An orthonormal basis (d, r) of the span of base and extra together.

    Args:
        base: (d, a), orthonormal; its columns come first.
        extra: (d, b).
        tolerance: a direction of extra is dropped if no more than this share of its length is outside of base's span.
    """
    for _ in range(2):  # the second pass takes away what rounding left
        extra = extra - base @ (base.T @ extra)
    u, s, _ = svd(extra)
    new = u[:, s > tolerance][:, : len(base) - base.shape[1]]  # no more can be outside
    new = torch.linalg.qr(new - base @ (base.T @ new))[0]
    return torch.cat([base, new], 1)


def shrink(second: Tensor, fourth: float, count: int, floor: float = 0.0) -> Tensor:
    """The shrunk covariance (1 - rho) C + rho tr(C)/d I, with the rho of Ledoit & Wolf (2004) from streamed moments.

    rho = min(1, (fourth - |C|^2) / count / |C - tr(C)/d I|^2), with the samples taken as centred.

    Args:
        second: C (d, d), the mean of x x^T.
        fourth: the mean of |x|^4.
        count: the number of samples.
        floor: the least rho.
    """
    mean = second.diagonal().mean()
    target = mean * torch.eye(len(second), dtype=second.dtype, device=second.device)
    spread, noise = (second - target).square().sum(), (fourth - second.square().sum()).clamp(min=0) / count
    rho = 1.0 if spread <= noise else float(noise / spread)
    rho = max(rho, floor)
    return (1 - rho) * second + rho * target
