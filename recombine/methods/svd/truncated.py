"""What methods share that factor weights by their spectra, and those of them that keep a share of every matrix."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from recombine.core.method import Method, Site, need
from recombine.linalg import svd
from recombine.methods.ranks import check_rank, rank_notes
from recombine.runtime import progress


@dataclass(kw_only=True)
class Spectral(Method, abstract=True):
    """The base of the methods that factor weights: the SVD of each layer is computed once."""

    compresses: ClassVar[bool] = True

    def digest(self, group: list[Site]) -> dict[str, Tensor]:
        """The SVD of a layer's weight in float64: u (m, N), s (N,), vh (N, n) with N = min(m, n)."""
        return dict(zip(("u", "s", "vh"), svd(group[0].module.weight), strict=True))

    def factors(self, site: Site) -> tuple[Tensor, ...]:
        """U (m, N), s (N,) and Vh (N, n) of a layer, in float64, computed once."""
        found = self.digested([site])
        return found["u"], found["s"], found["vh"]

    def spectrum(self, site: Site) -> Tensor:
        """The singular values s (N,) of a layer; nothing else is read."""
        return self.digested([site])["s"]

    def rewrite(self, model: nn.Module, sites: list[Site], losses=None) -> None:
        for site in progress.of(sites, "rewriting", "layers"):
            model.set_submodule(site.name, self.recombine(site))
            self.kept.drop(site.name)


@dataclass(kw_only=True)
class Truncated(Spectral, abstract=True):
    """The base of the methods that keep the same share of every matrix.

    A matrix is a layer's weight, or the weights of a group of layers in one stack.

    Args:
        ratio: share of the weights of a matrix (m, n) that is kept, k = ratio m n / (m + n).
        rank: the same k for all matrices, instead of `ratio`; narrower ones have their full rank.
    """

    ratio: float = 0.5
    rank: int | None = None

    budget_fields: ClassVar[dict[str, str]] = {"retained": "ratio", "memory": "ratio"}
    conflicting_fields: ClassVar[tuple[str, ...]] = ("rank",)

    def check(self, sites: list[Site]) -> None:
        need(0 < self.ratio <= 1, self, "ratio", "is a share of the weights, so it must lie in (0, 1]")
        if self.rank is not None:
            check_rank(self, self.widths(sites))

    def notes(self, sites: list[Site]) -> list[str]:
        return rank_notes(self, self.widths(sites))

    def widths(self, sites: list[Site]) -> dict[str, int]:
        """The largest rank of every group, by the name of its first layer."""
        return {group[0].name: min(shape(group)) for group in self.groups(sites)}

    def budget_values(self, field: str, sites: list[Site]) -> list[float]:
        return [i / 1000 for i in range(1, 1001)]

    def groups(self, sites: list[Site]) -> list[list[Site]]:
        """The layers that are factored together, group by group."""
        return [[site] for site in sites]

    def group_rank(self, group: list[Site]) -> int:
        """The rank k of a group's matrix."""
        m, n = shape(group)
        return max(1, int(self.ratio * m * n / (m + n))) if self.rank is None else min(self.rank, m, n)

    def sizes(self, sites: list[Site]) -> tuple[int, int]:
        return sum(self.group_rank(group) * sum(shape(group)) for group in self.groups(sites)), 0


def shape(group: list[Site]) -> tuple[int, int]:
    """The shape (m, n) of a group's weights in one stack."""
    return sum(site.module.weight.shape[0] for site in group), group[0].module.weight.shape[1]


def directions(site: Site) -> int:
    """The number of a layer's singular values, N = min(m, n)."""
    return min(site.module.weight.shape)
