"""Closed-form compensation: what is cut is predicted from what stays, and folded into the layer that reads both.

A layer y = W h + b reads h (n,), of which the entries S stay and P go. With h_P ~ B h_S + c,

    W' = W_S + W_P B,    b' = b + W_P c,    B = M_PS (M_SS + lambda I)^-1,

where M = E[h h^T] and c = 0 (MoDeGPT, arXiv 2408.09632, and GRAIL, 2602.23795), or with an intercept (CORP, 2602.05243)
M = E[h h^T] - m m^T and c = m_P - B m_S, m = E[h]. lambda is a share of the mean of M's diagonal. At lambda 0 it is the
least E|W h + b - W' h_S - b'|^2 of all W' and b', whatever W.
"""

from typing import NamedTuple

import torch
from torch import Tensor

RIDGE = 1e-6  # lambda, as a share of the mean of the diagonal, where a method has no field for it
TINY = 1e-30  # keeps a matrix of zeros invertible


class Moments(NamedTuple):
    """Of a layer's input h (n,): second (n, n) = E[h h^T] and mean (n,) = E[h], in float64."""

    second: Tensor
    mean: Tensor

    def centred(self) -> Tensor:
        """The covariance (n, n)."""
        return self.second - torch.outer(self.mean, self.mean)


def damped(matrix: Tensor, ridge: float) -> Tensor:
    """M + lambda I, with lambda = ridge times the mean of the diagonal."""
    result = matrix.clone()
    result.diagonal().add_(ridge * matrix.diagonal().mean() + TINY)
    return result


def predicted(moments: Moments, kept: Tensor, ridge: float, intercept: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(P, B, c): the indices (p,) of what goes, and B (p, k) and c (p,) with h_P ~ B h_S + c.

    Args:
        kept: S (k,), ascending.
        intercept: c is free; otherwise it is 0.
    """
    gone = torch.ones(len(moments.mean), dtype=torch.bool, device=kept.device)
    gone[kept] = False
    gone = gone.nonzero().flatten()
    mean = moments.mean if intercept else torch.zeros_like(moments.mean)
    inner = moments.second[kept][:, kept] - torch.outer(mean[kept], mean[kept])
    cross = moments.second[gone][:, kept] - torch.outer(mean[gone], mean[kept])
    b = torch.linalg.solve(damped(inner, ridge), cross, left=False)
    return gone, b, mean[gone] - b @ mean[kept]


def compensated(
    weight: Tensor, bias: Tensor | None, moments: Moments, kept: Tensor, ridge: float, intercept: bool = True
) -> tuple[Tensor, Tensor | None]:
    """W' (m, k) and b' (m,) in float64, of a layer W (m, n) and b that reads only the inputs S from now on.

    Where the layer has no bias, there is no intercept.
    """
    weight, kept = weight.detach().double(), kept.to(weight.device)
    gone, b, c = predicted(moments, kept, ridge, intercept and bias is not None)
    new = weight[:, kept] + weight[:, gone] @ b
    return new, None if bias is None else bias.detach().double() + weight[:, gone] @ c
