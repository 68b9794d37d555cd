"""Tensor mathematics that two or more methods share. Everything is returned in float64.

`svd` chooses its algorithm by shape, rank and device. With N = min(m, n):

    N <= SMALL        LAPACK's SVD
    larger            eigenvectors U of the smaller Gram matrix W W^T, then s and V^T from U^T W
    k <= N / THIN     randomised subspace iteration (Halko, Martinsson & Tropp, arXiv 0909.4061), then the same inside

|W - U_k S_k V_k^T| is at most 1.001 times that of LAPACK's SVD, plus 1e-12 |W|, for every k. A Gram matrix squares the
singular values, so those below 1e-3 of the largest are computed again from what is left of W. The iteration ends once
what further steps can gain is too little. Where it does not end, or leaves too little to judge, the Gram matrix is
used. On a GPU whose float64 is slow, the subspace of a rank k < N is found in float32, where rounding cannot cost more
than that either, and the rest is done in float64.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Factors = tuple[Tensor, Tensor, Tensor]

SILU_ARGMIN = -1.2784645427610738  # SiLU falls to its minimum here and rises ever after
SILU_MIN = -0.2784645427610738  # silu(SILU_ARGMIN): SiLU has no inverse below
GELU_ARGMIN = -0.7517915246935644  # the same of GELU, x Phi(x)
GELU_MIN = -0.16997120747990366

SMALL = 512  # directions up to which LAPACK's SVD is used: little would be gained, and its bits stay
THIN = 32  # ranks up to min(m, n) / THIN are found by iteration
SLACK = 5e-4  # of the squared error: a quarter of what 1.001 allows
SWEEPS = 24  # of the iteration, at most
LEAD = 1e-6  # a Gram matrix's eigenvalues above this share of the largest are good to 1e-10
FAST_FLOAT64 = {(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)}  # compute capabilities: P100, V100, A100, H100, B200


def svd(weight: Tensor, rank: int | None = None, finder: torch.dtype | None = None) -> Factors:
    """Thin SVD in float64: (m, n) -> U (m, k), s (k,) descending, Vh (k, n).

    Args:
        rank: k, at most N = min(m, n); None: N.
        finder: the precision in which the subspace of a rank below N is found, float32 or float64; None: by the device.
    """
    weight, size = weight.detach().double(), min(weight.shape)
    rank = size if rank is None else min(rank, size)
    if size <= SMALL:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        return u[:, :rank], s[:rank], vh[:rank]
    if weight.shape[0] > weight.shape[1]:
        u, s, vh = svd(weight.T, rank, finder)
        return vh.T, s, u.T
    finder = finder or finder_on(weight.device)
    found = iterated(weight, rank, finder) if rank <= size // THIN else None
    return found or by_gram(weight, rank, finder)


def finder_on(device: torch.device) -> torch.dtype:
    """The precision in which subspaces are found on a device: float32 on a GPU whose float64 is slow, else float64."""
    slow = device.type == "cuda" and torch.cuda.get_device_capability(device) not in FAST_FLOAT64
    return torch.float32 if slow else torch.float64


def by_gram(weight: Tensor, rank: int, finder: torch.dtype = torch.float64) -> Factors:
    """The k first singular triplets of a wide (m, n), m <= n, by the eigenvectors of W W^T."""
    gram = weight @ weight.T
    if finder == torch.float32 and rank < len(gram):
        values, vectors = torch.linalg.eigh(gram.float())
        tail = gram.trace() - values[-rank:].double().sum()
        if 16 * rank * torch.finfo(finder).eps * values[-1] <= SLACK * tail:  # 2 k |E|, |E| <= 8 eps |W W^T|
            return inside(torch.linalg.qr(vectors[:, -rank:].double())[0], weight, rank)
    values, vectors = torch.linalg.eigh(gram)
    values, u = values.flip(0), vectors.flip(1)
    lead = rank if weight.is_meta else min(int((values > LEAD * values[0]).sum()), rank)
    u = u[:, :rank] if lead == rank else u
    rows = u.T @ weight
    s = rows[:lead].norm(dim=1)
    vh = rows[:lead] / s[:, None]
    if lead < rank:
        rest = rows[lead:] - (rows[lead:] @ vh.T) @ vh
        left, small, right = torch.linalg.svd(rest, full_matrices=False)
        right = right - (right @ vh.T) @ vh  # what rounding left, over the small singular values
        u = torch.cat([u[:, :lead], u[:, lead:] @ left], 1)
        s, vh = torch.cat([s, small]), torch.cat([vh, right])
    return u[:, :rank], s[:rank], vh[:rank]


def inside(basis: Tensor, weight: Tensor, rank: int) -> Factors:
    """The k first singular triplets of basis basis^T W, for an orthonormal basis (m, l), l >= k."""
    u, s, vh = by_gram(basis.T @ weight, rank)
    return basis @ u, s, vh


def iterated(weight: Tensor, rank: int, finder: torch.dtype) -> Factors | None:
    """The k first singular triplets of a wide (m, n) by subspace iteration; None: the error may be too large."""
    w = weight.to(finder)
    rng = torch.Generator(w.device).manual_seed(0)  # no one's draws move
    y = w @ torch.randn(w.shape[1], 2 * rank + 32, generator=rng, dtype=finder, device=w.device)
    total, held = float(weight.square().sum()), [0.0]
    floor = 1e3 * torch.finfo(finder).eps * total
    for _ in range(SWEEPS):
        basis = torch.linalg.qr(y)[0]
        rows = basis.T @ w
        held.append(float(torch.linalg.eigvalsh(rows @ rows.T)[-rank:].double().sum()))
        rest = total - held[-1]
        if SLACK * rest < floor:
            return None
        if len(held) > 3:
            before, gain = held[-2] - held[-3], held[-1] - held[-2]
            if gain < before and gain * gain / (before - gain) <= SLACK * rest:  # all that is to come, as a series
                return inside(torch.linalg.qr(basis.double())[0], weight, rank)
        y = w @ rows.T
    return None


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
    if base.is_meta:  # nothing is known of extra: at most all directions
        return base.new_empty(len(base), min(len(base), base.shape[1] + extra.shape[1]))
    for _ in range(2):  # the second pass takes away what rounding left
        extra = extra - base @ (base.T @ extra)
    values, vectors = torch.linalg.eigh(extra.T @ extra)
    new = extra @ vectors[:, values > tolerance**2]
    new = new / new.norm(dim=0)  # orthogonal but for rounding, which this made larger
    return torch.cat([base, torch.linalg.qr(new - base @ (base.T @ new))[0]], 1)


def spectrum_exceeds(matrix: Tensor, top: int, share: float) -> bool:
    """Whether the eigenvalues after the `top` largest surely hold more than this share of the trace.

    No eigenvalue is computed. An LDL^T factorisation of M - mu I tells how many are above mu (Sylvester's law of
    inertia), at a tenth of the cost; three mu are tried. False: they may not.

    Args:
        matrix: M (d, d), positive semi-definite.
    """
    limit, rest = share * matrix.trace(), len(matrix) - top
    for above in (max(rest // part, 1) for part in (2, 4, 8)):  # so many of the rest above mu are enough
        shifted = plus_diagonal(matrix, -limit / above)
        factors, pivots, _ = torch.linalg.ldl_factor_ex(shifted)  # a pivot may be 0
        singles = pivots > 0  # the others are blocks of two, with one eigenvalue above 0 and one below
        positive = int((factors.diagonal()[singles] > 0).sum()) + int((~singles).sum()) // 2
        if limit > 0 and positive - top > above:
            return True
    return False


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
    spread, noise = plus_diagonal(second, -mean).square().sum(), (fourth - second.square().sum()).clamp(min=0) / count
    rho = 1.0 if spread <= noise else float(noise / spread)
    rho = max(rho, floor)
    return plus_diagonal((1 - rho) * second, rho * mean)


def plus_diagonal(matrix: Tensor, value: Tensor | float) -> Tensor:
    """M + value I of a square M."""
    matrix = matrix.clone()
    matrix.diagonal().add_(value)
    return matrix
