"""How the methods that keep k directions of a weight store them, and how they share one budget among all layers.

`factor=plain` stores left (m, k) and right (k, n). `factor=pivot` changes the basis between the two so that k columns
of right are the identity, which is not stored: k (m + n - k) weights, and k (m + n - k) multiplications a token, for
the same layer. Every rank below min(m, n) then stores less than the dense layer; a layer of rank min(m, n) stays dense.
(Paper: PIFA, arXiv 2501.19090, takes rows of left. Here: columns of right, since layers may share that.)

One budget for all layers: with s the spectrum that a method truncates, a rank k loses sum(s[k:]^2). The dense layer
loses nothing. One price per weight, found by bisection, spends the budget: a multiple-choice knapsack by Lagrangian
relaxation, as in BALF (arXiv 2509.25136).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor, nn

from recombine.core.method import Site, need
from recombine.layers import FactoredLinear
from recombine.layers.factored import pivoted
from recombine.methods.allocation import lagrangian
from recombine.methods.svd.spectral import Spectral


class Plain:
    """left (m, k) and right (k, n)."""

    def weights(self, m: int, n: int, k):
        """The weights that rank k stores; k may be a tensor."""
        return k * (m + n)

    def rank(self, m: int, n: int, weights):
        """The real rank that stores so many weights; they may be a tensor."""
        return weights / (m + n)

    def most(self, m: int, n: int) -> int:
        """The largest rank that stores less than the dense layer; 0 where there is none."""
        return (m * n - 1) // (m + n)


class Pivot(Plain):
    """left (m, k) and, beside the identity, right (k, n - k)."""

    def weights(self, m: int, n: int, k):
        return k * (m + n - k)

    def rank(self, m: int, n: int, weights):
        inside = (m + n) ** 2 - 4 * weights
        return (m + n - (inside.clamp(min=1) if isinstance(inside, Tensor) else max(inside, 1)) ** 0.5) / 2

    def most(self, m: int, n: int) -> int:
        return min(m, n) - 1


FACTORS = {"plain": Plain(), "pivot": Pivot()}


def dims(site: Site) -> tuple[int, int]:
    """The shape (m, n) of a layer's weight."""
    return tuple(site.module.weight.shape)


@dataclass(kw_only=True)
class LowRank(Spectral, abstract=True):
    """The base of the methods whose layers have two factors and nothing else.

    Args:
        factor: plain stores both factors of a layer; pivot stores k^2 weights less, for the same layer.
    """

    factor: str = "plain"

    def check(self, sites: list[Site]) -> None:
        need(self.factor in FACTORS, self, "factor", f"must be one of {', '.join(FACTORS)}")

    @property
    def form(self) -> Plain:
        """How the factors are counted."""
        return FACTORS.get(self.factor, FACTORS["plain"])

    def whole_rank(self, m: int, n: int, share: float) -> int:
        """The largest rank that stores at most this share of m n weights, but at least 1."""
        k, most = int(self.form.rank(m, n, share * m * n)), share * m * n * (1 + 1e-12)
        k += k < min(m, n) and self.form.weights(m, n, k + 1) <= most  # rounding may have crossed a whole number
        return max(1, k)

    def max_rank(self, site: Site) -> int:
        """The largest rank that stores less than the dense layer; 0 where there is none."""
        return self.form.most(*dims(site))

    def stored(self, sites: list[Site], ranks: list[int | None]) -> int:
        """Weights that the layers store at these ranks; None: the dense layer's."""
        shapes = map(dims, sites)
        return sum(m * n if k is None else self.form.weights(m, n, k) for (m, n), k in zip(shapes, ranks, strict=True))

    def ratios(self, sites: list[Site], ranks: list[int] | None = None) -> list[float]:
        """The shares of all layers' weights that one budget for all may have, from the smallest to 1.

        Args:
            ranks: the smallest rank of every layer; 0: it can only stay dense. None: 1.
        """
        smallest = [1] * len(sites) if ranks is None else [k or min(dims(x)) for k, x in zip(ranks, sites, strict=True)]
        shapes = map(dims, sites)
        least = sum(min(self.form.weights(m, n, k), m * n) for k, (m, n) in zip(smallest, shapes, strict=True))
        return [i / 1000 for i in range(ceil(1000 * least / sum(m * n for m, n in map(dims, sites))), 1001)]

    def options(self, site: Site, relative: bool = True) -> tuple[Tensor, Tensor]:
        """Costs and losses, two tensors (options,), of the ranks 1, 2, ... and then of the dense layer.

        Args:
            relative: losses are shares of the spectrum's energy.
        """
        (m, n), k = dims(site), self.max_rank(site)
        tail = self.spectrum(site).cpu().square().flip(0).cumsum(0).flip(0)  # (N,): at k what rank k loses
        lost = tail[1 : k + 1]
        if relative:
            lost = lost / tail[0].clamp(min=torch.finfo(tail.dtype).tiny)
        costs = self.form.weights(m, n, torch.arange(1, k + 1, dtype=tail.dtype))
        return torch.cat([costs, torch.tensor([m * n], dtype=tail.dtype)]), torch.cat([lost, tail.new_zeros(1)])

    def spend(
        self, sites: list[Site], found: list[tuple[Tensor, Tensor]], ratio: float, fill: bool = True
    ) -> list[int | None]:
        """The rank of every layer within one budget; None: it stays dense.

        Args:
            found: `options` of every layer.
            ratio: share of the weights of all layers together that is kept.
            fill: of `lagrangian`.
        """
        costs, losses = zip(*found, strict=True)
        picks = lagrangian(costs, losses, ratio * sum(float(cost[-1]) for cost in costs), fill=fill)
        return [None if i == self.max_rank(site) else i + 1 for i, site in zip(picks, sites, strict=True)]

    def finish(self, layers: Iterable[FactoredLinear]) -> None:
        """Gives finished layers the form of `factor`, in place. Layers that share right go on sharing it."""
        if self.factor == "pivot":
            pivot(layers)


def pivot(layers: Iterable[FactoredLinear]) -> None:
    """Gives layers the pivot form, in place. Layers that share right go on sharing it."""
    found: dict[int, tuple[Tensor, nn.Parameter, Tensor]] = {}  # by identity of right, which stays alive here
    for layer in layers:
        if id(layer.right) not in found:
            rest, order = pivoted(layer.right)
            rest = nn.Parameter(rest.to(layer.right).contiguous(), requires_grad=False)
            found[id(layer.right)] = layer.right, rest, order
        layer.pivot(*found[id(layer.right)][1:])
