"""CRISP's factors for what a layer outputs instead of what it weighs: alternating least squares on input moments.

min over B, G_1 ... G_g of sum_i E|W_i x - W'_i x|^2 / E|W_i x|^2; W'_i = B H_i, H_i = I (x) G_i (q r, n), q = n / s,
and B is seen as (m, q r). With C_i = E[x x^T] of layer i, from calibration, both steps are linear:
B = (sum W_i C_i H_i^T) (sum H_i C_i H_i^T)^-1, one Cholesky of q r; and G_i solves sum_ab B_a^T B_b G C_ba =
sum_a B_a^T (W C)_a, by conjugate gradients. The start is the truncated SVD of the chunks weighed by their mean moment.

Not in the paper. Each layer counts by its relative error, so one with large activations does not drown the others.
"""

import torch
from torch import Tensor

STEPS = 4  # of conjugate gradients: more change the error in its sixth digit


def fit_outputs(
    weights: list[Tensor], moments: list[Tensor], rank: int, chunk: int, alternations: int
) -> tuple[Tensor, Tensor]:
    """The basis (m n / s, r) and [G_1 ... G_g] (r, g s), in float64.

    Args:
        weights: the group's, all (m, n), in float64.
        moments: E[x x^T] (n, n) of each, positive definite or 0.
        alternations: of a G step and a B step, after a first B step.
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
    """G_i (r, s): the best if all chunks of an input had the same moment and were independent."""
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
    """B (m, q, r), given the G_i (r, s) and W_i C_i (m, n)."""
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
    """G (r, s), given B (m, q, r), from the G before; preconditioned by the mean diagonal blocks of B^T B and C."""
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
