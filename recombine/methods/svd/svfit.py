"""SVFit: the singular vectors stay, the largest singular values train (arXiv 2409.05926).

W = U diag(s) V^T with all N = min(m, n) directions. A layer stores U (m, N), V (N, n) and s (N,). The `rank` largest
entries of s train, N at most.

Paper: the rest of W is kept as a residual matrix. Here: it is kept as the other singular values. W is the same, and
CERSA's Table 14 counts it so.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from recombine.core.method import Site, need
from recombine.layers import FactoredLinear
from recombine.methods.svd.spectral import Spectral, directions


@dataclass(kw_only=True)
class Svfit(Spectral):
    """Trains the largest singular values of every weight (arXiv 2409.05926).

    Args:
        rank: how many of them train; all where a layer has fewer.
    """

    targets: tuple[str, ...] = ("q", "v")
    rank: int = 768

    compresses: ClassVar[bool] = False
    budget_fields: ClassVar[dict[str, str]] = {"trainable": "rank", "memory": "rank"}

    def check(self, sites: list[Site]) -> None:
        need(self.rank >= 1, self, "rank", "must be 1 or more; all singular values train where it exceeds their number")

    def budget_values(self, field: str, sites: list[Site]) -> Sequence[int]:
        return range(1, 1 + max(directions(site) for site in sites))

    def sizes(self, sites: list[Site]) -> tuple[int, int]:
        stored = sum(directions(site) * (1 + sum(site.module.weight.shape)) for site in sites)
        return stored, sum(min(self.rank, directions(site)) for site in sites)

    def recombine(self, site: Site) -> FactoredLinear:
        (u, s, vh), weight = self.factors(site), site.module.weight
        core, tail = s[: self.rank].to(weight), s[self.rank :].to(weight)
        layer = FactoredLinear(u.to(weight), vh.to(weight), core, tail if len(tail) else None, site.module.bias)
        layer.core.requires_grad_(True)
        return layer
