"""Ranks by one budget for all layers, for every method that truncates a spectrum.

With s the spectrum that a method truncates, a rank k costs k (m + n) weights and loses sum(s[k:]^2). The dense layer
costs m n and loses nothing; from k = m n / (m + n) on it is cheaper and better. One price per weight, found by
bisection, spends the budget: a multiple-choice knapsack by Lagrangian relaxation, as in BALF (arXiv 2509.25136).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor, nn

from recombine.core.method import Site, need
from recombine.layers import FactoredLinear
from recombine.methods.allocation import lagrangian
from recombine.methods.svd.truncated import Truncated
from recombine.runtime import progress

ALLOCATIONS = ("uniform", "share", "error")


def dims(site: Site) -> tuple[int, int]:
    """The shape (m, n) of a layer's weight."""
    return tuple(site.module.weight.shape)


def max_rank(site: Site) -> int:
    """The largest rank that stores less than the dense layer; 0 where there is none."""
    m, n = dims(site)
    return (m * n - 1) // (m + n)


def options(site: Site, s: Tensor, relative: bool) -> tuple[Tensor, Tensor]:
    """Costs and losses, two tensors (options,), of the ranks 1, 2, ... and then of the dense layer.

    Args:
        s: the spectrum (N,) of the layer.
        relative: losses are shares of the spectrum's energy.
    """
    (m, n), k = dims(site), max_rank(site)
    tail = s.cpu().square().flip(0).cumsum(0).flip(0)  # (N,): at k what rank k loses
    lost = tail[1 : k + 1]
    if relative:
        lost = lost / tail[0].clamp(min=torch.finfo(tail.dtype).tiny)
    costs = torch.cat([(m + n) * torch.arange(1, k + 1, dtype=tail.dtype), torch.tensor([m * n], dtype=tail.dtype)])
    return costs, torch.cat([lost, tail.new_zeros(1)])


def least_ratio(sites: list[Site]) -> float:
    """The share of the layers' weights that rank 1 in every layer stores."""
    return sum(min(m + n, m * n) for m, n in map(dims, sites)) / sum(m * n for m, n in map(dims, sites))


def thousandths(least: float) -> list[float]:
    """The ratios from `least` to 1 that a budget may choose, in steps of 0.001."""
    return [i / 1000 for i in range(ceil(1000 * least), 1001)]


@dataclass(kw_only=True)
class Allocated(Truncated, abstract=True):
    """The base of the methods whose ranks may differ from layer to layer.

    Args:
        allocation: of ranks. uniform: every layer keeps the same share. share, error: `ratio` is that of all layers
            together, and a layer may stay dense; what a rank loses counts as a share of the layer's energy, as in BALF,
            or as it is.
    """

    allocation: str = "uniform"

    @property
    def sizes_need_statistics(self) -> bool:
        """Whether ranks depend on spectra."""
        return self.allocation != "uniform"

    def check(self, sites: list[Site]) -> None:
        need(self.allocation in ALLOCATIONS, self, "allocation", f"must be one of {', '.join(ALLOCATIONS)}")
        super().check(sites)
        if self.allocation != "uniform":
            for name in self.conflicting_fields:
                why = f"chooses ranks, and so does {name}={getattr(self, name)}: drop one of them"
                need(getattr(self, name) is None, self, "allocation", why)
            least = self.budget_values("ratio", sites)[0]
            why = f"is less than rank 1 in every layer stores; from {least} on it fits"
            need(self.ratio >= least, self, "ratio", why)

    def budget_values(self, field: str, sites: list[Site]) -> list[float]:
        return super().budget_values(field, sites) if self.allocation == "uniform" else thousandths(least_ratio(sites))

    def largest(self, site: Site) -> int:
        """The largest rank of the layer that may be needed."""
        return self.group_rank([site]) if self.allocation == "uniform" else max_rank(site)

    def ranks(self, sites: list[Site]) -> list[int | None]:
        """The rank of every layer; None: it stays dense."""
        if self.allocation == "uniform":
            return [self.group_rank([site]) for site in sites]
        relative = self.allocation == "share"
        found = [options(site, self.spectrum(site), relative) for site in progress.of(sites, "factors", "layers")]
        return spend(sites, found, self.ratio)

    def sizes(self, sites: list[Site]) -> tuple[int, int]:
        return stored(sites, self.ranks(sites)), 0

    def rewrite(self, model: nn.Module, sites: list[Site], losses=None) -> None:
        for name, layer in self.factored(sites):
            model.set_submodule(name, layer)

    def factored(self, sites: list[Site]) -> Iterator[tuple[str, FactoredLinear]]:
        """The new layers, (site name, layer) one by one; one that stays dense is left out."""
        for site, k in zip(progress.of(sites, "rewriting", "layers"), self.ranks(sites), strict=True):
            if k is not None:
                yield site.name, self.recombine(site) if self.allocation == "uniform" else self.layer(site, k)
            self.kept.drop(site.name)

    def recombine(self, site: Site) -> FactoredLinear:
        return self.layer(site, self.group_rank([site]))

    def layer(self, site: Site, k: int) -> FactoredLinear:
        """The layer at rank k."""
        raise NotImplementedError(type(self).__name__)


def spend(sites: list[Site], found: list[tuple[Tensor, Tensor]], ratio: float, fill: bool = True) -> list[int | None]:
    """The rank of every layer within one budget; None: it stays dense.

    Args:
        found: `options` of every layer.
        ratio: share of the weights of all layers together that is kept.
        fill: of `lagrangian`.
    """
    costs, losses = zip(*found, strict=True)
    picks = lagrangian(costs, losses, ratio * sum(float(cost[-1]) for cost in costs), fill=fill)
    return [None if i == max_rank(site) else i + 1 for i, site in zip(picks, sites, strict=True)]


def stored(sites: list[Site], ranks: list[int | None]) -> int:
    """Weights that the layers store at these ranks."""
    return sum(m * n if k is None else k * (m + n) for (m, n), k in zip(map(dims, sites), ranks, strict=True))
