"""CRISP's factors fitted to a layer's outputs instead of its weights, by alternating least squares.

The fit minimises sum_i E|W_i x - W'_i x|^2 / E|W_i x|^2 over B, G_1 ... G_g. Each layer counts by its relative error,
so one with large activations does not outweigh the others. W'_i = B H_i with B seen as (m, q r), q = n / s, and
H_i = I (x) G_i (q r, n). C_i = E[x x^T] of layer i comes from calibration. Both steps are then linear:

    B = (sum_i W_i C_i H_i^T) (sum_i H_i C_i H_i^T)^-1             one Cholesky factorisation of size q r
    sum_ab B_a^T B_b G_i C_ba = sum_a B_a^T (W_i C_i)_a            for G_i, by conjugate gradients

The start is the truncated SVD of the chunks, weighed by their mean moment. Paper: has no such fit.
"""

import torch
from torch import Tensor

STEPS = 4  # of conjugate gradients; more of them change only the sixth digit of the error


def fit_outputs(
    weights: list[Tensor], moments: list[Tensor], rank: int, chunk: int, alternations: int
) -> tuple[Tensor, Tensor]:
    """Fits the basis (m n / s, r) and [G_1 ... G_g] (r, g s) of a group, in float64.

    Args:
        weights: of the group's layers, all (m, n), in float64.
        moments: E[x x^T] (n, n) of each layer, positive definite or 0.
        rank: r.
        chunk: s.
        alternations: pairs of a G step and a B step, after a first B step.
    """
    moments = [c if c.any() else torch.eye(len(c)).to(c) for c in moments]  # a layer that never saw an input
    outputs = [w @ c for w, c in zip(weights, moments, strict=True)]
    energy = [(wc * w).sum() for wc, w in zip(outputs, weights, strict=True)]
    shares = [1 / e if e > 0 else 1.0 for e in energy]
    gated = start(weights, moments, shares, rank, chunk)
    basis = solve_basis(outputs, moments, shares, gated)
    for _ in range(alternations):
        gated = [solve_mixer(basis, *known) for known in zip(outputs, moments, gated, strict=True)]
        basis = solve_basis(outputs, moments, shares, gated)
    return basis.reshape(-1, rank), torch.cat(gated, 1)


def start(weights: list[Tensor], moments: list[Tensor], shares: list, rank: int, chunk: int) -> list[Tensor]:
    """The first G_i (r, s), which are optimal if the chunks of an input are independent and have the same moment."""
    roots, pieces = [], []
    for w, c, share in zip(weights, moments, shares, strict=True):
        blocks = c.view(-1, chunk, c.shape[0] // chunk, chunk).diagonal(dim1=0, dim2=2)  # (s, s, q)
        roots.append(torch.linalg.cholesky(blocks.mean(-1)))
        pieces.append(w.reshape(-1, chunk) @ roots[-1] * share**0.5)
    m = torch.cat(pieces, 1)
    rows = torch.linalg.eigh(m.T @ m)[1].flip(1)[:, :rank].T
    return [
        torch.linalg.solve_triangular(root, g, upper=False, left=False) / share**0.5
        for root, g, share in zip(roots, rows.split(chunk, 1), shares, strict=True)
    ]


def solve_basis(outputs: list[Tensor], moments: list[Tensor], shares: list, gated: list[Tensor]) -> Tensor:
    """B (m, q, r), given the G_i (r, s), the W_i C_i (m, n) and each layer's weight in the sum (shares)."""
    (m, n), (r, s) = outputs[0].shape, gated[0].shape
    left, right = 0.0, 0.0
    for wc, c, share, g in zip(outputs, moments, shares, gated, strict=True):
        ch = (c.view(-1, s) @ g.T).view(n, -1)  # C H^T (n, q r)
        left = left + share * (g @ ch.view(n // s, s, -1)).flatten(0, 1)  # H C H^T (q r, q r)
        right = right + share * (wc.view(-1, s) @ g.T).view(m, -1)
    ridge = 1e-12 * left.diagonal().mean()
    factor = torch.linalg.cholesky(left + ridge * torch.eye(len(left)).to(left))
    return torch.cholesky_solve(right.T, factor).T.reshape(m, n // s, r)


def solve_mixer(basis: Tensor, output: Tensor, moment: Tensor, gated: Tensor) -> Tensor:
    """G (r, s), given B (m, q, r), W C (m, n) and C (n, n), by conjugate gradients from the previous G.

    They are preconditioned by the mean diagonal blocks of B^T B and C.
    """
    (m, q, r), s = basis.shape, gated.shape[1]
    gram = (basis.flatten(1).T @ basis.flatten(1)).view(q, r, q, r)  # B_a^T B_b at [a, :, b]
    blocks = moment.view(q, s, q, s)  # C_ba at [b, :, a]
    wide, tall = gram.permute(1, 0, 2, 3).reshape(r, -1), blocks.permute(1, 2, 0, 3).reshape(s, -1)

    def apply(g: Tensor) -> Tensor:  # sum_ab B_a^T B_b G C_ba
        return wide @ (g @ tall).view(r, q * q, s).transpose(0, 1).reshape(-1, s)

    (rows, u), (columns, v) = (torch.linalg.eigh(t.diagonal(dim1=0, dim2=2).mean(-1)) for t in (gram, blocks))
    size = (q * rows.clamp(min=1e-9 * rows[-1]).outer(columns.clamp(min=1e-9 * columns[-1]))).clamp(min=1e-300)
    residual = torch.einsum("mar,mas->rs", basis, output.view(m, q, s)) - apply(gated)
    direction, before = 0.0, 1.0
    for _ in range(STEPS):
        better = u @ ((u.T @ residual @ v) / size) @ v.T
        now = (residual * better).sum()
        direction = better + now / before * direction
        moved = apply(direction)
        length = now / (direction * moved).sum().clamp(min=1e-300)
        gated, residual, before = gated + length * direction, residual - length * moved, now.clamp(min=1e-300)
    return gated
