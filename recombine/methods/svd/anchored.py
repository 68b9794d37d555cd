"""A fit of low-rank layers to what the original model gives, although their inputs have drifted: AA-SVD and SAES-SVD.

x are a layer's inputs in the original model, z those in the model whose layers before it are compressed, H = E[z z^T],
D = E[(x - z) z^T]. The layer's target is the mix (1 - b) W z + b W x of the outputs that its own weight and the
original model give. Of all weights, M fits it best, and of rank k the one nearest to M under H:

    M = W + b W D H^+,    W' = U_k U_k^T M,    U the left singular vectors of M H^1/2.

AA-SVD (arXiv 2604.02119, objective 4 of its code): b = 1. SAES-SVD (2602.03051) chooses b for every layer, so that rank
k keeps most of the target. With the subspaces of W H^1/2 frozen, what it loses is a ratio of two quadratics in b (Eq.
17); the least one is at a root of Eq. 19 or at a bound. The paper's bounds are 0.25 and 0.75 (Tab. 4).

A ridge of RIDGE times the mean of diag(H) keeps W where H says little. Without one, layers of many inputs fit the noise
of few tokens: experiments/compressors/README.md.
Paper: AA-SVD trains every block afterwards on the original's outputs. Here: the stages distil the whole model.
Paper: AA-SVD reads layer after layer. Here: layers that read one input are fitted at once, which is the same.
"""

import torch
from torch import Tensor

from recombine.core.drift import Moments
from recombine.linalg import weighted_svd

RIDGE = 1e-2


def correction(weight: Tensor, moments: Moments) -> Tensor:
    """W D H^+ (m, n) in float64, by which b times moves the target."""
    cross, own = moments
    ridge = RIDGE * own.diagonal().mean().clamp(min=torch.finfo(own.dtype).tiny)
    root = torch.linalg.cholesky(own + ridge * torch.eye(len(own), dtype=own.dtype, device=own.device))
    return torch.cholesky_solve((weight.detach().double() @ (cross - own)).T, root).T


def target(weight: Tensor, moments: Moments, bounds: tuple[float, float], rank: int) -> Tensor:
    """M (m, n) in float64, with the b of `share`.

    Args:
        weight: W (m, n).
        bounds: the least and the largest b.
    """
    step = correction(weight, moments)
    low, high = bounds
    return weight.detach().double() + (low if low == high else share(weight, step, moments, bounds, rank)) * step


def share(weight: Tensor, step: Tensor, moments: Moments, bounds: tuple[float, float], rank: int) -> float:
    """b of SAES-SVD (Eq. 19): the share of the target's energy outside of frozen subspaces of rank k is least.

    With M = W + b C, S = W H^1/2 = U Sigma V^T and G = C H^1/2 that share is |P (S + b G) Q|^2 / |S + b G|^2, P and Q
    the projections away from the first k left and right singular vectors of S. No root of H is formed.

    Args:
        step: C = W D H^+, as `correction` gives it.
    """
    weight, own = weight.detach().double(), moments[1]
    u, s = weighted_svd(weight, own)
    u, kept = u[:, :rank], s[:rank].square()
    moved = step @ own  # G H^1/2
    with_s, with_g = moved @ weight.T, moved @ step.T  # G S^T and G G^T, both (m, m)
    turned = with_s @ u
    inside = turned - u @ (u.T @ turned)  # P G V_k Sigma_k
    seen = kept > 1e-12 * kept[:1].clamp(min=torch.finfo(s.dtype).tiny)
    a, whole_a = s[rank:].square().sum(), s.square().sum()
    b, whole_b = with_s.trace() - (u * turned).sum(), with_s.trace()
    c = with_g.trace() - (u * (with_g @ u)).sum() - (inside[:, seen].square() / kept[seen]).sum()
    return least(*map(float, (a, b, c.clamp(min=0), whole_a, whole_b, with_g.trace())), *bounds)


def least(a: float, b: float, c: float, p: float, q: float, r: float, low: float, high: float) -> float:
    """The t in [low, high] of the least (a + 2 b t + c t^2) / (p + 2 q t + r t^2)."""
    square, linear, constant = c * q - b * r, c * p - a * r, b * p - a * q
    inner = linear**2 - 4 * square * constant
    found = [low, high]
    if square:
        found += [(-linear + sign * max(inner, 0.0) ** 0.5) / (2 * square) for sign in (1, -1) if inner >= 0]
    elif linear:
        found.append(-constant / linear)

    def lost(t: float) -> float:
        below = p + 2 * q * t + r * t * t
        return (a + 2 * b * t + c * t * t) / below if below > 0 else 0.0

    return min((t for t in found if low <= t <= high), key=lost)
