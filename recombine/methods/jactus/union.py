"""JACTUS's closed form for one layer: the union of subspaces and the whitened optimum inside it (see method.py).

U_w and V_w hold the share alpha of the energy of W = U S V^T, V_x the share beta of C_x, U_g the share gamma of C_g.
The unions are Q_L = orth[U_w, U_g] and Q_R = orth[V_w, V_x]. With the Cholesky factors Q_L^T C_g Q_L = R_L^T R_L and
Q_R^T C_x Q_R = R_R^T R_R,

    T = R_L^-T Q_L^T C_g W C_x Q_R R_R^-1 = P L R^T,   W_k = (Q_L R_L^-1 P_k) L_k (Q_R R_R^-1 R_k)^T.

The gain of rank j is L_j^2. P and L^2 come from the smaller of T T^T and T^T T, and L_k R_k^T = P_k^T T. A QR
factorisation of the outer factors leaves orthonormal ones and a dense core.

Where the two subspaces of a union have as many dimensions together as the space, it is taken as the whole space: Q = I
and T = R_L W R_R^T. No eigenvector is needed then. That is what the union is, unless a direction lies outside of both
subspaces by chance; then the optimum is over one direction more, so its error is no larger.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

from recombine.layers import DeltaLinear, FactoredLinear
from recombine.linalg import energy_rank, orthonormal_union, shrink, spectrum_exceeds, svd


@dataclass(eq=False)
class Covariance:
    """A covariance: C (d, d), shrunk and scaled to a mean eigenvalue of 1, and what was measured (d, d).

    What is derived is computed once, where it is needed.
    """

    matrix: Tensor
    measured: Tensor
    proven: int = 0  # directions that `needs` has found needed

    @cached_property
    def root(self) -> Tensor:
        """R (d, d), upper triangular, with C = R^T R."""
        return torch.linalg.cholesky(self.matrix, upper=True)

    @cached_property
    def eigen(self) -> tuple[Tensor, Tensor]:
        """The measured eigenvalues (d,), descending, and the eigenvectors (d, d), in columns."""
        values, vectors = torch.linalg.eigh(self.measured)  # shrinking moves no eigenvector
        return values.flip(0).clamp(min=0), vectors.flip(1)

    def rank(self, share: float) -> int:
        """The smallest number of directions that hold this share of what was measured."""
        return energy_rank(self.eigen[0].sqrt(), share)

    def needs(self, count: int, share: float) -> bool:
        """Whether `rank` is at least `count`. Layers that share this covariance ask for the same share."""
        if count > self.proven:
            if share < 1 and not spectrum_exceeds(self.measured, count - 1, 1 - share):
                return self.rank(share) >= count
            self.proven = count
        return True


class Side(NamedTuple):
    """One side of a layer: its union and how it is weighed.

    covariance: C; None: the identity. basis: Q (d, r); None: the whole space. root: R (r, r), upper triangular, with
    Q^T C Q = R^T R; None: the identity.
    """

    covariance: Covariance | None
    basis: Tensor | None
    root: Tensor | None

    def weigh(self, x: Tensor) -> Tensor:
        """R^-T Q^T C x, for x (d, n)."""
        if self.covariance is None or self.basis is not None:
            return self.pull(x if self.covariance is None else self.covariance.matrix @ x)
        return upper_product(self.root, x)

    def pull(self, x: Tensor) -> Tensor:
        """R^-T Q^T x, for x (d, n)."""
        x = x if self.basis is None else self.basis.T @ x
        return x if self.root is None else torch.linalg.solve_triangular(self.root.T, x, upper=False)

    def lift(self, y: Tensor) -> Tensor:
        """Q R^-1 y, for y (r, k)."""
        y = y if self.root is None else torch.linalg.solve_triangular(self.root, y, upper=True)
        return y if self.basis is None else self.basis @ y


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
    widest: int | None = None,
) -> Whole:
    """The best weight of every rank inside the union, in float64.

    Args:
        weight: W (m, n).
        inputs: of x.
        outputs: of g; None: all outputs count alike, and the union has no directions of g.
        shares: alpha, beta, gamma.
        turn: E[g x^T] (m, n) and eta. The subspaces are then those of T - eta |T| / |G| G, with G the whitened
            gradient, where a step of descent would go; the weight is projected onto them. None: those of T.
        widest: the largest rank whose factors are needed; None: all.
    """
    left, right = sides(weight, inputs, outputs, shares)
    t = right.weigh(left.weigh(weight).T).T
    if turn is None:
        return optimum(t, left, right, widest)
    grad = right.pull(left.pull(turn[0]).T).T
    p, s, rh = svd(t - turn[1] * t.norm() / grad.norm().clamp(min=1e-300) * grad)
    p, rh = p[:, :widest], rh[:widest]
    return Whole(left.lift(p), p.T @ t @ rh.T, right.lift(rh.T).T, s.square())


def sides(
    weight: Tensor, inputs: Covariance, outputs: Covariance | None, shares: tuple[float, float, float]
) -> tuple[Side, Side]:
    """The left and the right side of a layer; see `union_factors`. W's singular vectors are computed if needed."""
    (m, n), (alpha, beta, gamma) = weight.shape, shares
    kept, vectors = min(m, n), None
    if alpha < 1:
        gram = weight @ weight.T if m <= n else weight.T @ weight
        kept = energy_rank(torch.linalg.eigvalsh(gram).flip(0).clamp(min=0).sqrt(), alpha)
    found = []
    for i, (covariance, share, d) in enumerate(((outputs, gamma, m), (inputs, beta, n))):
        if kept == d or covariance is not None and covariance.needs(d - kept, share):
            found.append(Side(covariance, None, None if covariance is None else covariance.root))
            continue
        vectors = vectors or svd(weight, kept)
        basis = vectors[0] if i == 0 else vectors[2].T
        if covariance is None:
            found.append(Side(None, basis, None))
            continue
        basis = orthonormal_union(basis, covariance.eigen[1][:, : covariance.rank(share)])
        root = torch.linalg.cholesky(basis.T @ covariance.matrix @ basis, upper=True)
        found.append(Side(covariance, basis, root))
    return tuple(found)


def optimum(t: Tensor, left: Side, right: Side, widest: int | None) -> Whole:
    """The factors of `Whole` from T (r_L, r_R): P and L^2 by the smaller Gram matrix, and then P^T T."""
    if len(t) > t.shape[1]:
        flipped = optimum(t.T, right, left, widest)
        return Whole(flipped.right.T, flipped.inner, flipped.left.T, flipped.gains)
    values, vectors = torch.linalg.eigh(t @ t.T)
    p = vectors.flip(1)[:, :widest]
    rows = p.T @ t
    gains = torch.cat([rows.square().sum(1), values.flip(0).clamp(min=0)[p.shape[1] :]])
    eye = torch.eye(p.shape[1], dtype=p.dtype, device=p.device)
    return Whole(left.lift(p), eye, right.lift(rows.T).T, gains)


def upper_product(root: Tensor, x: Tensor, rows: int = 256) -> Tensor:
    """R x (d, n) for an upper triangular R (d, d) and x (d, n); so many rows at once, without the zeros before them."""
    return torch.cat([root[i : i + rows, i:] @ x[i:] for i in range(0, len(root), rows)])


def covariance(second: Tensor, fourth: float, tokens: int, floor: float) -> Covariance:
    """The covariance of the streamed moments E[x x^T] (d, d) and E[|x|^4] over `tokens` tokens; rho >= floor."""
    shrunk = shrink(second, fourth, tokens, floor)
    scale = shrunk.diagonal().mean()
    shrunk = shrunk / scale if scale > 0 else torch.eye(len(shrunk), dtype=shrunk.dtype, device=shrunk.device)
    return Covariance(shrunk, second)


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
