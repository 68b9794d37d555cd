"""BALF: budgeted activation-aware low-rank factorisation (arXiv 2509.25136).

Every layer is factored as in SVD-LLM, W' = U_k U_k^T W, or stays dense. The ranks are chosen together: with s the
spectrum of W E[x x^T]^1/2, a rank k costs k (m + n) weights and loses sum(s[k:]^2) / sum(s^2), the share of the
layer's output energy; dense costs m n and loses nothing. One price per weight, found by bisection, spends the budget
(a multiple-choice knapsack by Lagrangian relaxation). From k = m n / (m + n) on, dense is cheaper and better.

Stored: left (m, k) and right (k, n), or the layer as it was. Trains: nothing.

Paper: in its code, what the last price leaves of the budget stays unspent (`fill=false`). Here: it is given out.
The paper's convolutions and its budget in FLOPs, which for linear layers differs only by the tokens each sees, are
left out.
"""

from dataclasses import dataclass
from math import ceil
from typing import ClassVar

import torch
from torch import Tensor, nn

from recombine.core.method import Site, need
from recombine.linalg import weighted_svd
from recombine.methods.allocation import lagrangian
from recombine.methods.svd.truncated import Spectral
from recombine.methods.svd.weighted import truncated


@dataclass(kw_only=True)
class Whitened(Spectral, abstract=True):
    """Whitened SVD with ranks of its own for every layer.

    Args:
        ratio: weights kept, of all target layers together.
    """

    ratio: float = 0.5

    budget_fields: ClassVar[dict[str, str]] = {"retained": "ratio", "memory": "ratio"}

    def check(self, sites: list[Site]) -> None:
        need(0 < self.ratio <= 1, self, "ratio", "is a share of the weights, so it must lie in (0, 1]")
        least = self.budget_values("ratio", sites)[0]
        need(self.ratio >= least, self, "ratio", f"is less than rank 1 in every layer stores; from {least} on it fits")

    def budget_values(self, field: str, sites: list[Site]) -> list[float]:
        least = sum(min(m + n, m * n) for m, n in map(dims, sites)) / sum(m * n for m, n in map(dims, sites))
        return [i / 1000 for i in range(ceil(1000 * least), 1001)]

    def statistics_needed(self) -> set[str]:
        return {"inputs"}

    def decompose(self, site: Site) -> tuple[Tensor, Tensor]:
        """U (m, k) up to the rank that saves weights, s (N,)."""
        u, s = weighted_svd(site.module.weight, self.stats[site.name].inputs.xx)
        return u[:, : max_rank(site)].clone(), s


def dims(site: Site) -> tuple[int, int]:
    return tuple(site.module.weight.shape)


def max_rank(site: Site) -> int:
    """The largest rank that stores less than the dense layer; 0 where there is none."""
    m, n = dims(site)
    return (m * n - 1) // (m + n)


@dataclass(kw_only=True)
class Balf(Whitened):
    """Ranks, or dense, by a knapsack over the shares of output energy.

    Args:
        fill: give out what one price for all layers leaves of the budget.
    """

    fill: bool = True

    def sizes(self, sites: list[Site]) -> tuple[int, int]:
        ranks = self.ranks(sites)
        return sum(m * n if k is None else k * (m + n) for (m, n), k in zip(map(dims, sites), ranks, strict=True)), 0

    def ranks(self, sites: list[Site]) -> list[int | None]:
        """The rank of every layer; None: dense."""
        costs, losses = zip(*map(self.options, sites), strict=True)
        picks = lagrangian(costs, losses, self.ratio * sum(float(cost[-1]) for cost in costs), fill=self.fill)
        return [None if i == max_rank(site) else i + 1 for i, site in zip(picks, sites, strict=True)]

    def options(self, site: Site) -> tuple[Tensor, Tensor]:
        """Costs and losses of the ranks 1, 2, ... and of the dense layer, which comes last."""
        (m, n), k = dims(site), max_rank(site)
        tail = self.factors(site)[1].cpu().square().flip(0).cumsum(0).flip(0)  # (N,): at k what rank k loses
        share = tail[1 : k + 1] / tail[0].clamp(min=torch.finfo(tail.dtype).tiny)
        costs = torch.cat([(m + n) * torch.arange(1, k + 1, dtype=tail.dtype), tail.new_tensor([m * n])])
        return costs, torch.cat([share, tail.new_zeros(1)])

    def rewrite(self, model: nn.Module, sites: list[Site], losses=None) -> None:
        for site, k in zip(sites, self.ranks(sites), strict=True):
            u, _ = self._factors.pop(site.name)
            if k is not None:
                model.set_submodule(site.name, truncated(site, u[:, :k]))
