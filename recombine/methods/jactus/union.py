"""JACTUS's closed form for one layer: the union of subspaces and the whitened optimum inside it (see method.py).

U_w and V_w hold the share alpha of the energy of W = U S V^T, V_x the share beta of C_x, U_g the share gamma of C_g.
The unions are Q_L = orth[U_w, U_g] and Q_R = orth[V_w, V_x]. With the Cholesky factors Q_L^T C_g Q_L = R_L^T R_L and
Q_R^T C_x Q_R = R_R^T R_R,

    T = R_L^-T Q_L^T C_g W C_x Q_R R_R^-1 = P L R^T,   W_k = (Q_L R_L^-1 P_k) L_k (Q_R R_R^-1 R_k)^T.

The gain of rank j is L_j^2. A QR factorisation of the outer factors leaves orthonormal ones and a dense core.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from recombine.layers import DeltaLinear, FactoredLinear
from recombine.linalg import energy_rank, orthonormal_union, shrink, svd


class Covariance(NamedTuple):
    """A covariance: C (d, d), shrunk and scaled to a mean eigenvalue of 1, and the spectrum of what was measured.

    values (d,) are the measured eigenvalues, descending, and vectors (d, d) the eigenvectors, in columns.
    """

    matrix: Tensor
    values: Tensor
    vectors: Tensor


class Whole(NamedTuple):
    """A layer's factors at every rank up to r: W_k = left[:, :k] inner[:k, :k] right[:k].

    left (m, r), inner (r, r), right (r, n). gains are the L_j^2 of all ranks, those above r as well.
    """

    left: Tensor
    inner: Tensor
    right: Tensor
    gains: Tensor

    def truncate(self, r: int, dtype: torch.dtype) -> "Whole":
        """The factors up to rank r, in `dtype` but at least float32: float64 of all layers takes too much memory."""
        keep = torch.promote_types(dtype, torch.float32)
        return Whole(self.left[:, :r].to(keep), self.inner[:r, :r].to(keep), self.right[:r].to(keep), self.gains)

    def factors_at(self, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """W_k as orthonormal left (m, k), dense core (k, k) and orthonormal right (k, n), in float64."""
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
    """The best weight of every rank inside the union, in float64.

    Args:
        weight: W (m, n).
        inputs: of x.
        outputs: of g; None: all outputs count alike, and the union has no directions of g.
        shares: alpha, beta, gamma.
        turn: E[g x^T] (m, n) and eta. The subspaces are then those of T - eta |T| / |G| G, with G the whitened
            gradient, where a step of descent would go; the weight is projected onto them. None: those of T.
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
    """The covariance of the streamed moments E[x x^T] (d, d) and E[|x|^4] over `tokens` tokens; rho >= floor."""
    shrunk = shrink(second, fourth, tokens, floor)
    scale = shrunk.diagonal().mean()
    shrunk = shrunk / scale if scale > 0 else torch.eye(len(shrunk), dtype=shrunk.dtype, device=shrunk.device)
    values, vectors = torch.linalg.eigh(second)  # shrinking moves no eigenvector
    return Covariance(shrunk, values.flip(0).clamp(min=0), vectors.flip(1))


def whiten(rl: Tensor, inner: Tensor, rr: Tensor) -> Tensor:
    """R_L^-T inner R_R^-1, for upper triangular R_L and R_R."""
    half = torch.linalg.solve_triangular(rl.T, inner, upper=False)
    return torch.linalg.solve_triangular(rr, half, upper=True, left=False)


def factored(linear: nn.Linear, whole: Whole, k: int) -> FactoredLinear:
    """The layer at rank k, whose core trains."""
    left, core, right = (t.to(linear.weight) for t in whole.factors_at(k))
    layer = FactoredLinear(left, right, core=core, bias=linear.bias)
    layer.core.requires_grad_(True)
    return layer


def dense_with_core(linear: nn.Linear, whole: Whole, k: int) -> DeltaLinear:
    """The dense layer with a core on its k top directions beside it. The core starts at 0 and trains."""
    left, core, right = (t.to(linear.weight) for t in whole.factors_at(k))
    layer = DeltaLinear(linear.weight, left, right, bias=linear.bias, core=torch.zeros_like(core))
    layer.core.requires_grad_(True)
    return layer
