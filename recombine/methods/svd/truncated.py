"""What methods share that keep the same share of every matrix."""

from dataclasses import dataclass
from typing import ClassVar

from recombine.core.method import Site, need
from recombine.methods.ranks import check_rank, rank_notes
from recombine.methods.svd.low_rank import LowRank


@dataclass(kw_only=True)
class Truncated(LowRank, abstract=True):
    """The base of the methods that keep the same share of every matrix.

    A matrix is a layer's weight, or the weights of a group of layers in one stack.

    Args:
        ratio: share of the weights of a matrix (m, n) that is kept, k = ratio m n / (m + n) with `factor=plain`; at 1
            it stays dense.
        rank: the same k for all matrices, instead of `ratio`; narrower ones have their full rank.
    """

    ratio: float = 0.5
    rank: int | None = None

    budget_fields: ClassVar[dict[str, str]] = {"retained": "ratio", "memory": "ratio"}
    conflicting_fields: ClassVar[tuple[str, ...]] = ("rank",)

    def check(self, sites: list[Site]) -> None:
        super().check(sites)
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

    def group_rank(self, group: list[Site]) -> int:
        """The rank k of a group's matrix."""
        m, n = shape(group)
        return self.whole_rank(m, n, self.ratio) if self.rank is None else min(self.rank, m, n)

    def stays_dense(self, group: list[Site]) -> bool:
        """Whether a group's layers are kept whole, which at that size loses nothing."""
        if self.ratio == 1 and all(getattr(self, name) is None for name in self.conflicting_fields):
            return True
        return self.factor == "pivot" and self.group_rank(group) == min(shape(group))

    def sizes(self, sites: list[Site]) -> tuple[int, int]:
        return sum(self.group_size_of(group) for group in self.groups(sites)), 0

    def group_size_of(self, group: list[Site]) -> int:
        """Weights that a group stores."""
        m, n = shape(group)
        return m * n if self.stays_dense(group) else self.form.weights(m, n, self.group_rank(group))


def shape(group: list[Site]) -> tuple[int, int]:
    """The shape (m, n) of a group's weights in one stack."""
    return sum(site.module.weight.shape[0] for site in group), group[0].module.weight.shape[1]
