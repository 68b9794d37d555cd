"""Dobi-SVD's soft truncation of one batch's activations, with the gradient through their SVD."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CLOSE = 1e-10  # share of the largest eigenvalue below which a gap counts as that: its inverse would be rounding error


class Truncation(torch.autograd.Function):
    """Scales the singular values of y: y = U diag(s) V^T (T, m) -> U diag(s t) V^T, with the gate t.

    The result is y V diag(t) V^T, with V the eigenvectors of C = y^T y and l its eigenvalues. By Daleckii and Krein
    d(V diag(t) V^T) = V (K * V^T dC V) V^T with K_ij = (t_i - t_j) / (l_i - l_j) and K_ii = 0, since t depends on the
    place of a singular value and not on its size. Singular vectors themselves are not differentiated, so T < m and
    zero columns need no care.
    """

    @staticmethod
    def forward(ctx, y: Tensor, gate: Tensor) -> Tensor:
        """y (T, m) and the gate t (k,) of its k largest singular values -> (T, m); the other values become 0."""
        values, vectors = torch.linalg.eigh(y.double().T @ y.double())
        values, vectors = values.flip(0), vectors.flip(1)
        whole = torch.cat([gate.double(), values.new_zeros(len(values) - len(gate))])
        ctx.save_for_backward(y, values, vectors, whole)
        ctx.count = len(gate)
        return y @ ((vectors * whole) @ vectors.T).to(y)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients (T, m) of y and (k,) of the gate."""
        y, values, vectors, gate = ctx.saved_tensors
        inner = vectors.T @ (y.double().T @ grad.double()) @ vectors
        gap = values[:, None] - values
        bound = (CLOSE * values[0]).square().clamp(min=torch.finfo(values.dtype).tiny)
        kernel = (gate[:, None] - gate) * gap / (gap.square() + bound)
        change = vectors @ (kernel * (inner + inner.T)) @ vectors.T  # S + S^T, S = dL/dC
        return grad @ ((vectors * gate) @ vectors.T).to(y) + y @ change.to(y), inner.diagonal()[: ctx.count].to(y)
