"""BALF: budgeted activation-aware low-rank factorisation (arXiv 2509.25136).

Every layer is factored as in SVD-LLM, W' = U_k U_k^T W, or stays dense. The ranks of all layers are chosen together.
With s the spectrum of W E[x x^T]^1/2, a rank k costs k (m + n) weights and loses the share sum(s[k:]^2) / sum(s^2) of
the layer's output energy. The dense layer costs m n and loses nothing; from k = m n / (m + n) on it is cheaper and
better. One price per weight, found by bisection, spends the budget: a multiple-choice knapsack by Lagrangian
relaxation.

A layer stores left (m, k) and right (k, n), or stays as it was. Nothing trains.

Paper: in its code, what the last price leaves of the budget stays unspent (`fill=false`). Here: it is spent.
Paper: convolutions, and a budget in FLOPs. Here: linear layers, and a budget in weights; for linear layers the two
budgets differ only by the number of tokens that each layer sees.
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
    """The base of whitened SVDs in which every layer has a rank of its own.

    Args:
        ratio: share of the weights of all target layers together that is kept.
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

    def digest(self, group: list[Site]) -> dict[str, Tensor]:
        """u (m, k), with k the largest rank that saves weights, and s (N,), of W E[x x^T]^1/2 in float64."""
        (site,) = group
        u, s = weighted_svd(site.module.weight, self.stats[site.name].inputs.xx)
        return {"u": u[:, : max_rank(site)].clone(), "s": s}

    def left(self, site: Site) -> Tensor:
        """u of `digest`."""
        return self.digested([site])["u"]


def dims(site: Site) -> tuple[int, int]:
    """The shape (m, n) of a layer's weight."""
    return tuple(site.module.weight.shape)


def max_rank(site: Site) -> int:
    """The largest rank that stores less than the dense layer; 0 where there is none."""
    m, n = dims(site)
    return (m * n - 1) // (m + n)


@dataclass(kw_only=True)
class Balf(Whitened):
    """Chooses a rank for every layer, or leaves it dense, by a knapsack over output energies (arXiv 2509.25136).

    Args:
        fill: spend what one price for all layers leaves of the budget.
    """

    fill: bool = True

    def sizes(self, sites: list[Site]) -> tuple[int, int]:
        ranks = self.ranks(sites)
        return sum(m * n if k is None else k * (m + n) for (m, n), k in zip(map(dims, sites), ranks, strict=True)), 0

    def ranks(self, sites: list[Site]) -> list[int | None]:
        """The rank of every layer; None: it stays dense."""
        costs, losses = zip(*map(self.options, sites), strict=True)
        picks = lagrangian(costs, losses, self.ratio * sum(float(cost[-1]) for cost in costs), fill=self.fill)
        return [None if i == max_rank(site) else i + 1 for i, site in zip(picks, sites, strict=True)]

    def options(self, site: Site) -> tuple[Tensor, Tensor]:
        """Costs and losses, two tensors (options,), of the ranks 1, 2, ... and then of the dense layer."""
        (m, n), k = dims(site), max_rank(site)
        tail = self.spectrum(site).cpu().square().flip(0).cumsum(0).flip(0)  # (N,): at k what rank k loses
        share = tail[1 : k + 1] / tail[0].clamp(min=torch.finfo(tail.dtype).tiny)
        costs = torch.cat([(m + n) * torch.arange(1, k + 1, dtype=tail.dtype), torch.tensor([m * n], dtype=tail.dtype)])
        return costs, torch.cat([share, tail.new_zeros(1)])

    def rewrite(self, model: nn.Module, sites: list[Site], losses=None) -> None:
        for site, k in zip(sites, self.ranks(sites), strict=True):
            if k is not None:
                self.kept.put(model, site.name, truncated(site, self.left(site)[:, :k]))
            self.kept.drop(site.name)
