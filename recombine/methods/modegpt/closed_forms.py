"""The closed forms of one block: which neurons and which dimensions of its heads stay, and with what weights.

C = E[x x^T] (d, d) and m = E[x] (d,) are of the tensor that q, k and v read. Everything is float64.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from recombine.methods.pruning.compensation import Moments, damped


class Affine(NamedTuple):
    """W (m, d) and b (m,), of which b may be zeros, in float64."""

    weight: Tensor
    bias: Tensor

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None) -> "Affine":
        """Of a layer's tensors, of any type."""
        weight = weight.detach().double()
        return cls(weight, weight.new_zeros(len(weight)) if bias is None else bias.detach().double())

    def second(self, x: Moments) -> Tensor:
        """E[y y^T] (m, m) of y = W x + b."""
        shift = torch.outer(self.weight @ x.mean, self.bias)
        return self.weight @ x.second @ self.weight.T + shift + shift.T + torch.outer(self.bias, self.bias)

    def mapped(self, matrix: Tensor) -> "Affine":
        """matrix (k, m) times y."""
        return Affine(matrix @ self.weight, matrix @ self.bias)

    def heads(self, count: int) -> list["Affine"]:
        """Its rows as so many heads."""
        return [Affine(*pair) for pair in zip(self.weight.chunk(count), self.bias.chunk(count), strict=True)]


def stacked(parts: list[Affine]) -> Affine:
    """One after the other."""
    return Affine(torch.cat([part.weight for part in parts]), torch.cat([part.bias for part in parts]))


def leverage(matrix: Tensor, ridge: float) -> Tensor:
    """Ridge leverage scores (n,): the diagonal of M (M + lambda I)^-1, lambda = ridge times the mean of M's diagonal.

    M (n, n) is positive semi-definite.
    """
    factor = torch.linalg.cholesky(damped(matrix, ridge))
    lam = ridge * matrix.diagonal().mean()
    return 1 - lam * torch.cholesky_inverse(factor).diagonal()


def largest(scores: Tensor, count: int) -> Tensor:
    """The indices (count,) of the largest scores, ascending; of equal ones the first."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def selected(q: Tensor, k: Tensor, width: int, rotary: bool) -> Tensor:
    """The dimensions (width,) of a head that q^T k needs most, by the product of their second moments.

    Args:
        q, k: diagonals (d,) of E[q q^T], summed over the heads that share k, and of E[k k^T].
        rotary: dimensions i and i + d/2 stay or go together, and the pairs come in the tables' order.
    """
    scores = q * k
    if not rotary:
        return largest(scores, width)
    pairs = largest(scores.unflatten(0, (2, -1)).sum(0), width // 2)
    return torch.cat([pairs, pairs + len(q) // 2])


def logit_maps(q: Tensor, k: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """A and B (width, d) with the least E[(q^T k - (A q)^T (B k))^2], for independent q and k.

    With roots R_q^T R_q = E[q q^T], R_k likewise, and R_q R_k^T = U S V^T: A = S^-1/2 V^T R_k, B = S^-1/2 U^T R_q, the
    first `width` of each. No root is inverted.

    Args:
        q, k: second moments (d, d), q summed over the heads that share k.
    """
    roots = []
    for matrix in (q, k):
        values, vectors = torch.linalg.eigh(matrix)
        roots.append(values.clamp(min=0).sqrt()[:, None] * vectors.T)
    u, s, vh = torch.linalg.svd(roots[0] @ roots[1].T)
    u, s, vh = u[:, :width], s[:width], vh[:width]
    size = torch.where(s > 1e-12 * s[:1], s.clamp(min=1e-300).rsqrt(), 0.0)[:, None]
    return size * (vh @ roots[1]), size * (u.T @ roots[0])


def query_key(
    q: list[Affine], k: Affine, x: Moments, width: int, *, rotary: bool, select: bool, centre: bool
) -> tuple[list[Affine], Affine, Tensor | None]:
    """(q', k', S) of the heads that share one head of keys; S (width,): the dimensions that stay, or None.

    Args:
        select: dimensions are selected; otherwise, without `rotary`, the best product of rank `width` is taken.
        centre: keys count less their mean, which adds the same to all logits of a query, so that softmax drops it.
    """
    moment = sum(part.second(x) for part in q)
    keys = k.weight @ x.centred() @ k.weight.T if centre and not rotary else k.second(x)
    if select or rotary:
        stay = selected(moment.diagonal(), keys.diagonal(), width, rotary)
        return [Affine(h.weight[stay], h.bias[stay]) for h in q], Affine(k.weight[stay], k.bias[stay]), stay
    a, b = logit_maps(moment, keys, width)
    return [h.mapped(a) for h in q], k.mapped(b), None


def value_output(
    v: Affine, o: list[Tensor], x: Moments, width: int, *, fold: bool, centre: bool
) -> tuple[Affine, list[Tensor], list[Tensor]]:
    """(v', o', shifts): the rank-`width` form of o_h (v x) with the least error over x, for the heads that share v.

    The o_h (m, d_h) are stacked to one matrix Q R, so the error is that of R (v x). shifts are what the biases of the
    o_h gain, since the rows of an attention sum to 1.

    Args:
        fold: v's bias and, with `centre`, the mean of what is cut go into the shifts; otherwise v' keeps a bias.
    """
    basis, root = torch.linalg.qr(torch.cat(o))  # (heads m, d_h), (d_h, d_h)
    y = v.mapped(root)
    if not fold:
        moment = y.second(x)
    else:
        moment = y.weight @ (x.centred() if centre else x.second) @ y.weight.T
    u = torch.linalg.eigh(moment).eigenvectors.flip(1)[:, :width]
    new, out = y.mapped(u.T), list((basis @ u).chunk(len(o)))
    if not fold:
        return new, out, []
    mean = x.mean if centre else torch.zeros_like(x.mean)
    shifts = [a @ (v.weight @ mean + v.bias) - b @ (new.weight @ mean) for a, b in zip(o, out, strict=True)]
    return Affine(new.weight, torch.zeros_like(new.bias)), out, shifts
