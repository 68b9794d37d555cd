"""JACTUS's closed form for one layer: the union of subspaces and the whitened optimum inside it (see jactus.py).

U_w, V_w hold the share alpha of the energy of W = U S V^T, V_x the share beta of C_x, U_g the share gamma of C_g;
Q_L = orth[U_w, U_g], Q_R = orth[V_w, V_x]. With Q_L^T C_g Q_L = R_L^T R_L and Q_R^T C_x Q_R = R_R^T R_R (Cholesky),

    T = R_L^-T Q_L^T C_g W C_x Q_R R_R^-1 = P L R^T,   W_k = (Q_L R_L^-1 P_k) L_k (Q_R R_R^-1 R_k)^T.

The gain of rank j is L_j^2. QR of the outer factors leaves orthonormal ones and a dense core.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from recombine.layers import DeltaLinear, FactoredLinear
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

    def truncate(self, r: int, dtype: torch.dtype) -> "Whole":
        """Up to rank r, in that precision and at least float32: float64 of all layers is too much."""
        keep = torch.promote_types(dtype, torch.float32)
        return Whole(self.left[:, :r].to(keep), self.inner[:r, :r].to(keep), self.right[:r].to(keep), self.gains)

    def factors_at(self, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """W at rank k as orthonormal left (m, k) and right (k, n) around a dense core (k, k), in float64."""
        ql, tl = torch.linalg.qr(self.left[:, :k].double())
        qr, tr = torch.linalg.qr(self.right[:k].T.double())
        return ql, tl @ self.inner[:k, :k].double() @ tr.T, qr.T


def union_factors(
    weight: Tensor,
    inputs: Covariance,
    outputs: Covariance | None,
    shares: tuple[float, float, float],
    turn: tuple[Tensor, float] | None,
) -> Whole:
    """At every rank the best weight inside the union, in float64.

    Args:
        weight: (m, n).
        outputs: of g; None: all outputs count alike and no direction of theirs joins the union.
        shares: alpha, beta, gamma.
        turn: E[g x^T] (m, n) and eta: the subspaces are those of T - eta |T| / |G| G, G the whitened gradient, which is
            where a step of descent would go; the weight is projected on them.
    """
    alpha, beta, gamma = shares
    u, s, vh = svd(weight)
    kept = energy_rank(s, alpha)
    ql, sensitive = u[:, :kept], torch.eye(len(u), dtype=u.dtype, device=u.device)
    if outputs is not None:
        ql = orthonormal_union(ql, outputs.vectors[:, : energy_rank(outputs.values.sqrt(), gamma)])
        sensitive = outputs.matrix
    qr = orthonormal_union(vh[:kept].T, inputs.vectors[:, : energy_rank(inputs.values.sqrt(), beta)])
    rl = torch.linalg.cholesky(ql.T @ sensitive @ ql, upper=True)
    rr = torch.linalg.cholesky(qr.T @ inputs.matrix @ qr, upper=True)
    t = turned = whiten(rl, ql.T @ sensitive @ weight @ inputs.matrix @ qr, rr)
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


def factored(linear: nn.Linear, whole: Whole, k: int) -> FactoredLinear:
    """The layer at rank k; its core trains."""
    left, core, right = (t.to(linear.weight) for t in whole.factors_at(k))
    layer = FactoredLinear(left, right, core=core, bias=linear.bias)
    layer.core.requires_grad_(True)
    return layer


def dense_with_core(linear: nn.Linear, whole: Whole, k: int) -> DeltaLinear:
    """The layer as it is, with a core on its k top directions beside it, 0 at the start, which trains."""
    left, core, right = (t.to(linear.weight) for t in whole.factors_at(k))
    layer = DeltaLinear(linear.weight, left, right, bias=linear.bias, core=torch.zeros_like(core))
    layer.core.requires_grad_(True)
    return layer
