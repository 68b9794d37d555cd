"""CRISP Alg. 5, Stages 1 and 1b: fewer basis columns by importance-weighted k-means, then new coefficients.

The teacher is exact, W_i = B G_i, and no data is needed. Stage 1 has four steps: the importance w_k of every column;
k-means of the columns together with their coefficient rows; one column for each cluster, the weighted mean rescaled to
its members' mean power; the coefficients summed within each cluster. Stage 1b finds the coefficients by least squares
on the teacher's weights instead.

Paper: w_k = |B_k| + lambda sum_i |A_ik|_1 (lambda is not given, here 1); the features are a random projection of B and
A; sums and least squares are over A before the gate (`printed=true`). All of these change when B_k doubles and G_k
halves. The gate is then applied to what was fitted without it: silu(x) ~ x / 2 halves the weights.
Here: w_k = |B_k|^2 |G_k|^2; the features are balanced columns and rows, with exact distances from their Gram matrix;
sums and least squares are over G, which is ungated afterwards.
By Eckart and Young no clustering has a smaller weight error than `fit=closed` at the same rank.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from recombine.errors import UsageError


@dataclass
class Cluster:
    """Fields of `method.cluster`: how Alg. 5 is run.

    Args:
        teacher: how the exact model is made: closed (the SVD) or mimicry.
        printed: importance, features, sums and least squares of the mixers before the gate, as Alg. 5 prints them.
        resolve: run Stage 1b.
    """

    teacher: str = "closed"
    printed: bool = False
    resolve: bool = True

    def check(self) -> None:
        """Refuses with a UsageError for an unknown teacher."""
        if self.teacher not in ("closed", "mimicry"):
            raise UsageError(f"method.cluster.teacher={self.teacher}: must be closed or mimicry")


def merge(basis: Tensor, rows: Tensor, goal: Tensor, rank: int, how: Cluster) -> tuple[Tensor, Tensor]:
    """A basis (u, r) and coefficients (r, g s) that stand for a teacher's.

    The coefficients, given and returned, are those after the gate; with `printed` those before it.

    Args:
        basis: the teacher's, (u, R).
        rows: the teacher's coefficients, (R, g s).
        goal: the weights, (u, g s).
        rank: r.
    """
    if how.printed:
        importance = basis.norm(dim=0) + rows.abs().sum(1)
    else:
        importance = (basis.norm(dim=0) * rows.norm(dim=1)).square()
        balance = (basis.norm(dim=0) / rows.norm(dim=1).clamp(min=1e-300)).sqrt().clamp(min=1e-300)
        top = rows.gather(1, rows.abs().argmax(1, keepdim=True)).squeeze(1)
        balance = torch.where(top < 0, -balance, balance)  # the largest entry of every row positive
        basis, rows = basis / balance, rows * balance[:, None]
    values, vectors = torch.linalg.eigh(basis.T @ basis + rows @ rows.T)
    points = vectors * values.clamp(min=0).sqrt()  # (R, R), as far from each other as the features are
    member = F.one_hot(kmeans(points, importance, rank), rank).to(basis)  # (R, r)
    share = importance[:, None] * member
    share = share / share.sum(0).clamp(min=1e-300)
    mean = basis @ share
    power = basis.square().sum(0) @ share
    basis = mean * (power / mean.square().sum(0).clamp(min=1e-300)).sqrt()
    if how.resolve:
        return basis, torch.linalg.pinv(basis.T @ basis, rtol=1e-12, hermitian=True) @ (basis.T @ goal)
    return basis, member.T @ rows


def kmeans(points: Tensor, weight: Tensor, count: int, rounds: int = 100) -> Tensor:
    """The cluster (R,), in [0, count), of each of the points (R, d), by Lloyd's k-means.

    The heaviest points, by weight (R,), are the first centres.
    """
    centres = points[weight.argsort(descending=True, stable=True)[:count]]
    label = None
    for _ in range(rounds):
        new = torch.cdist(points, centres, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
        if label is not None and torch.equal(new, label):
            break
        label = new
        share = weight[:, None] * F.one_hot(label, count)
        total = share.sum(0)[:, None]
        centres = torch.where(total > 0, share.T @ points / total.clamp(min=1e-300), centres)
    return label
