"""CRISP's closed form: a truncated SVD through a small Gram matrix, and the scaling in which the gate is inverted.

M = [M_1 ... M_g] (m n / s, g s) with M_i = reshape(W_i, (m n / s, s)). With the eigenvectors V of M^T M, B = M V_r and
[G_1 ... G_g] = V_r^T minimise |M - B G| (Eckart & Young 1936). A row of G is defined only up to a factor, which the
column of B takes up. So each row is scaled, and turned, until it lies where the gate can be inverted. That choice of
factors is the gauge.
"""

import torch
from torch import Tensor, nn

from recombine.core.method import Site
from recombine.linalg import gelu_inverse, silu_inverse

INVERSES = {"silu": silu_inverse, "gelu": gelu_inverse, "none": lambda g: g}
LOWEST = {"silu": -0.2, "gelu": -0.12, "none": -0.2}  # of gated mixers: SiLU reaches -0.278, GELU -0.170, with slope 0
HIGHEST = {"silu": 8.0, "gelu": 8.0, "none": 1.0}  # and for rows without a negative entry worth the name


def stack(group: list[Site], chunk: int) -> Tensor:
    """M = [M_1 ... M_g] (m n / s, g s) of a group, in float64."""
    return torch.cat([site.module.weight.detach().double().reshape(-1, chunk) for site in group], 1)


def spectrum(m: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (g s,), descending and not negative, and eigenvectors (g s, g s) of M^T M."""
    values, vectors = torch.linalg.eigh(m.T @ m)
    return values.flip(0).clamp(min=0), vectors.flip(1)


def truncate(m: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """B (m n / s, r) and G (r, g s) that minimise |M - B G|. The rows of G are orthonormal."""
    rows = spectrum(m)[1][:, :rank].T
    return m @ rows.T, rows


def random_orthogonal(m: Tensor, rank: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random B (m n / s, r) and G (r, g s) with orthogonal columns and rows, scaled so that |B G| = |M| (Tab. 8)."""
    draw = [
        nn.init.orthogonal_(torch.empty(*shape, dtype=m.dtype), generator=rng)
        for shape in ((len(m), rank), (rank, m.shape[1]))
    ]
    basis, rows = (t.to(m.device) for t in draw)
    return basis * (m.norm() / (basis @ rows).norm()), rows


def ungate(basis: Tensor, gated: Tensor, gate: str, gauge: str) -> tuple[Tensor, Tensor]:
    """B (u, r) and A (r, g s) with B gate(A) = basis . gated: scales the rows of gated, then inverts the gate.

    Args:
        gate: silu, gelu or none.
        gauge: svd scales every row by itself, balanced all rows by the square root of their singular value and then by
            one factor; rotated turns those by a random orthogonal matrix, the same for every r.
    """
    size = gated.norm(dim=1, keepdim=True)
    top = gated.gather(1, gated.abs().argmax(1, keepdim=True))
    scale = torch.where(size > 0, 1 / size, 1.0) * torch.where(top < 0, -1.0, 1.0)  # largest entry of each row positive
    if gauge != "svd":  # rows in proportion to the square root of their singular value
        power = basis.norm(dim=0)[:, None] * size
        scale = scale * (power / power.max().clamp(min=1e-300)).clamp(min=1e-6).sqrt()
    if gauge == "rotated":
        turn = torch.empty(len(gated), len(gated), dtype=gated.dtype)
        turn = nn.init.orthogonal_(turn, generator=torch.Generator().manual_seed(len(gated))).to(gated.device)
        basis, gated, scale = basis / scale.T @ turn.T, turn @ (gated * scale), torch.ones_like(scale)
    low, high = (gated * scale).amin(1, keepdim=True), (gated * scale).amax(1, keepdim=True)
    if gauge != "svd":
        low, high = low.amin(), high.amax()
    scale = scale * torch.minimum(LOWEST[gate] / low.clamp(max=-1e-12), HIGHEST[gate] / high.clamp(min=1e-12))
    return basis / scale.T, INVERSES[gate](gated * scale)
