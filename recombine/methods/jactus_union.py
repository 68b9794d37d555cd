"""JACTUS's closed form for one layer: the union of subspaces and the whitened optimum inside it (see jactus.py)."""

from typing import NamedTuple

import torch
from torch import Tensor

from recombine.linalg import energy_rank, orthonormal_union, shrink, svd


class Covariance(NamedTuple):
    """C (d, d), shrunk and with mean eigenvalue 1; of what was measured, eigenvalues, descending, and eigenvectors."""

    matrix: Tensor
    values: Tensor
    vectors: Tensor


class Whole(NamedTuple):
    """W at rank k is left[:, :k] inner[:k, :k] right[:k]; left (m, r), right (r, n), gains (all,) = the L_j^2."""

    left: Tensor
    inner: Tensor
    right: Tensor
    gains: Tensor


def union_factors(
    weight: Tensor,
    inputs: Covariance,
    outputs: Covariance,
    shares: tuple[float, float, float],
    turn: tuple[Tensor, float] | None,
) -> Whole:
    """At every rank the best weight inside the union, in float64.

    Args:
        weight: (m, n).
        shares: alpha, beta, gamma.
        turn: E[g x^T] (m, n) and eta: the subspaces are those of T - eta |T| / |G| G, G the whitened gradient, which is
            where a step of descent would go; the weight is projected on them.
    """
    alpha, beta, gamma = shares
    u, s, vh = svd(weight)
    kept = energy_rank(s, alpha)
    ql = orthonormal_union(u[:, :kept], outputs.vectors[:, : energy_rank(outputs.values.sqrt(), gamma)])
    qr = orthonormal_union(vh[:kept].T, inputs.vectors[:, : energy_rank(inputs.values.sqrt(), beta)])
    rl = torch.linalg.cholesky(ql.T @ outputs.matrix @ ql, upper=True)
    rr = torch.linalg.cholesky(qr.T @ inputs.matrix @ qr, upper=True)
    t = turned = whiten(rl, ql.T @ outputs.matrix @ weight @ inputs.matrix @ qr, rr)
    if turn is not None:
        grad = whiten(rl, ql.T @ turn[0] @ qr, rr)
        turned = t - turn[1] * t.norm() / grad.norm().clamp(min=1e-300) * grad
    p, gains, rh = svd(turned)
    inner = torch.diag(gains) if turn is None else p.T @ t @ rh.T
    left = ql @ torch.linalg.solve_triangular(rl, p, upper=True)
    right = qr @ torch.linalg.solve_triangular(rr, rh.T, upper=True)
    return Whole(left, inner, right.T, gains.square())


def covariance(second: Tensor, fourth: float, tokens: int, floor: float) -> Covariance:
    shrunk = shrink(second, fourth, tokens, floor)
    scale = shrunk.diagonal().mean()
    shrunk = shrunk / scale if scale > 0 else torch.eye(len(shrunk), dtype=shrunk.dtype, device=shrunk.device)
    values, vectors = torch.linalg.eigh(second)  # shrinking moves no eigenvector
    return Covariance(shrunk, values.flip(0).clamp(min=0), vectors.flip(1))


def whiten(rl: Tensor, inner: Tensor, rr: Tensor) -> Tensor:
    """R_L^-T inner R_R^-1 for upper triangular R_L, R_R."""
    half = torch.linalg.solve_triangular(rl.T, inner, upper=False)
    return torch.linalg.solve_triangular(rr, half, upper=True, left=False)
