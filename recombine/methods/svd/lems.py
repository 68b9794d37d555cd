"""Ranks by what a model's predictions lose: LEMS (openreview IjIgNPFuCt, ICML 2026) and ATP (arXiv 2502.14770).

LEMS. Each layer alone is cut to r0, a tenth of its break-even rank m n / (m + n), and KL_l measures what that does to
the model's predictions. At a rank r it is taken to lose

    e_l(r) = KL_l (1 - E_l(r)) / (1 - E_l(r0)) (1 + gamma d_b),

with E_l(r) the share of the energy of the layer's spectrum that r keeps. d_b falls from 1 in the first block to 0 in
the last: sum_{j >= b} (j + 1)^-alpha, from least to most. Ranks are multiples of 8, or the layer stays dense; a
knapsack spends the budget. Language models choose (alpha, gamma) by the divergence of the whole compressed model; for
others there is no d_b.

ATP. The share that a block keeps falls linearly from the first to the last, by beta in all. beta is the one of eleven
with the least divergence of the whole compressed model.

Paper's code: an integer program, no rank below 0.3 or 0.1 of the break-even one, the first 256 tokens left out, and ten
trials of TPE for (alpha, gamma). Here: BALF's Lagrangian relaxation, no such bound, all tokens, and a grid of ten.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from recombine.core.method import Site
from recombine.core.sites import block_of
from recombine.methods.allocation import lagrangian
from recombine.models import roles

DEPTHS = [(0.0, 0.0), *((alpha, gamma) for alpha in (0.0, 1.0, 3.0) for gamma in (1.0, 3.0, 7.0))]
STEPS = 11  # values of beta


class Effect(NamedTuple):
    """What cutting one layer alone does.

    Args:
        divergence: KL_l.
        rank: r0.
        block: index of the layer's block; None: it is in none.
    """

    divergence: float
    rank: int
    block: int | None


def cut_rank(m: int, n: int) -> int:
    """r0 of a layer (m, n), at least 1."""
    return max(1, m * n // (10 * (m + n)))


def steps(most: int, multiple: int) -> range:
    """The ranks of a layer that may be taken: the multiples up to `most`, or all where there is none."""
    return range(multiple, most + 1, multiple) if multiple <= most else range(1, most + 1)


def blocks_of(model: nn.Module, sites: Sequence[Site]) -> tuple[list[int | None], int]:
    """The index of every layer's block, None outside of blocks, and the number of blocks."""
    names = roles.block_names(model)
    return [block_of(site.name, names) for site in sites], len(names)


def depths(count: int, alpha: float) -> Tensor:
    """d_b (count,) of so many blocks."""
    sums = torch.arange(1, count + 1, dtype=torch.float64).pow(-alpha).flip(0).cumsum(0).flip(0)
    return (sums - sums[-1:]) / (sums[:1] - sums[-1:]).clamp(min=torch.finfo(sums.dtype).tiny)


def allocate(
    options: Sequence[tuple[Tensor, Tensor]],
    effects: Sequence[Effect],
    allowed: Sequence[range],
    scale: Sequence[float],
    budget: float,
) -> list[int | None]:
    """LEMS's rank of every layer within the budget; None: it stays dense.

    Args:
        options: costs and lost shares of the ranks 1, 2, ... and of the dense layer, for every layer.
        allowed: the ranks that may be taken.
        scale: 1 + gamma d_b of every layer.
        budget: weights of all layers together.
    """
    costs, losses, picks = [], [], []
    for (cost, share), effect, ranks, factor in zip(options, effects, allowed, scale, strict=True):
        pick = [*(k - 1 for k in ranks), len(cost) - 1]
        at = share[min(effect.rank, len(share)) - 1].clamp(min=1e-6)
        costs.append(cost[pick])
        losses.append(factor * effect.divergence * share[pick] / at)
        picks.append(pick)
    found = lagrangian(costs, losses, budget)
    last = [len(cost) - 1 for cost, _ in options]
    return [None if pick[i] == end else pick[i] + 1 for pick, i, end in zip(picks, found, last, strict=True)]


def taper(
    blocks: Sequence[int | None],
    count: int,
    beta: float,
    ranks: Callable[[list[float]], list[int | None]],
    stored: Callable[[list[int | None]], int],
    budget: float,
) -> list[int | None]:
    """ATP's rank of every layer: shares that fall by beta from the first block to the last, as large as the budget.

    Args:
        blocks, count: as `blocks_of` gives them.
        ranks: from shares to ranks.
        stored: from ranks to weights.
    """
    slopes = [0.0 if b is None or count < 2 else beta * (0.5 - b / (count - 1)) for b in blocks]

    def at(level: float) -> list[int | None]:
        return ranks([min(1.0, max(0.0, level + slope)) for slope in slopes])

    low, high = -1.0, 2.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if stored(at(middle)) <= budget else (low, middle)
    return at(low)


def betas(ratio: float) -> list[float]:
    """The values of beta that ATP tries, from 0 to 2 min(c, 1 - c), with c the share that is kept."""
    return [2 * min(ratio, 1 - ratio) * i / (STEPS - 1) for i in range(STEPS)]
