"""JACTUS: joint adaptation and compression with a task-aware union of subspaces (arXiv 2605.02829, Alg. 1).

Calibration gives C_x = E[x x^T] and C_g = E[g g^T], g = dL/dy, each scaled to a mean eigenvalue of 1 and shrunk
(Ledoit & Wolf 2004). Inside a union of subspaces of W, C_x and C_g (`jactus_union`), W_k of rank k minimises
|C_g^1/2 (W - W_k) C_x^1/2|_F. Ranks are allocated over all layers by marginal gain per weight (`jactus_ranks`).
Orthonormal left (m, k) and right (k, n) are frozen, a dense core (k, k) between them trains. Stored: k (m + n) + k^2;
after training the core folds away, which leaves k (m + n).

Ablation: `sensitivity: none` looks at no gradients: C_g = I and no U_g, so with alpha = 1 W_k is the whitened SVD, and
with `relative` and `allocation: lagrangian` ranks are chosen as BALF chooses them. Paper: both are not in it.

Paper (read from its abstract, figures and reviews; no code): the caption gives the gradient directions to the input
side. Here: C_g weighs the output side, where g lives. Paper: no values of alpha, beta, gamma. Here: large, as only the
calibration pays for a wide union, and .95, .99, .99 lose accuracy (experiments/LOG.md). Paper: every layer is factored.
Here: a layer may stay dense where that is cheaper (`dense`), or not, as the paper has it: dense="none".
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from recombine.core.method import Site, need
from recombine.methods.allocation import greedy, lagrangian
from recombine.methods.jactus.rank_options import Prices
from recombine.methods.jactus.subspaces import Subspaces
from recombine.methods.jactus.union import dense_with_core, factored
from recombine.runtime import progress

SPEND = {"greedy": greedy, "lagrangian": lagrangian}
CHOICES = {
    "counted": ("stored", "deployed"),
    "allocation": tuple(SPEND),
    "dense": ("none", "frozen", "full", "core_on_top_k"),
}


@dataclass(kw_only=True)
class Jactus(Subspaces):
    """What the unions are made of is `Subspaces`'s.

    Args:
        ratio: share of the target layers' weights that is kept.
        counted: stored counts the core's k^2 as well, deployed what is left once it is folded away.
        allocation: greedy (the paper's) or lagrangian.
        relative: a layer's gains count as shares of their sum, not as they are.
        dense: a layer left dense trains nothing (frozen), itself (full) or a core on its top directions
            (core_on_top_k); none: no layer is left dense.
        top_k: the size of that core.
    """

    ratio: float = 0.8
    counted: str = "stored"
    allocation: str = "greedy"
    relative: bool = False
    dense: str = "core_on_top_k"
    top_k: int = 32

    compresses: ClassVar[bool] = True
    budget_fields: ClassVar[dict[str, str]] = {"retained": "ratio", "memory": "ratio"}

    def check(self, sites: list[Site]) -> None:
        super().check(sites)
        need(0 < self.ratio <= 1, self, "ratio", "is a share, so it must lie in (0, 1]")
        for name, known in CHOICES.items():
            need(getattr(self, name) in known, self, name, f"must be one of {', '.join(known)}")
        need(self.top_k >= 1, self, "top_k", "a core has at least one direction")

    @property
    def prices(self) -> Prices:
        return Prices(self.counted == "stored", self.dense, self.top_k)

    def budget_values(self, field: str, sites: list[Site]) -> list[float]:
        dense = sum(site.module.weight.numel() for site in sites)
        least = sum(self.prices.factored(*site.module.weight.shape, 1) for site in sites) / dense
        return [i / 1000 for i in range(int(1000 * least) + 1, 1001)]

    def widest(self, site: Site) -> int:
        return max(self.prices.max_rank(*site.module.weight.shape), self.top_k)

    def top(self, site: Site) -> int:
        """The size of the core on a layer that stays dense."""
        return min(self.top_k, len(self.whole(site).right))

    def ranks(self, sites: list[Site]) -> list[int | None]:
        """The rank of every layer; None: it stays dense."""
        shapes = [site.module.weight.shape for site in sites]
        wholes = [self.whole(site) for site in progress.of(sites, "factors", "layers")]
        options = [
            self.prices.options(*shape, whole.gains, len(whole.right), self.relative)
            for shape, whole in zip(shapes, wholes, strict=True)
        ]
        costs, losses = zip(*options, strict=True)
        chosen = SPEND[self.allocation](costs, losses, self.ratio * sum(m * n for m, n in shapes))
        dense = [len(cost) - 1 if self.dense != "none" else -1 for cost in costs]
        return [None if i == last else i + 1 for i, last in zip(chosen, dense, strict=True)]

    def retained_weights(self, sites: list[Site]) -> int:
        shapes = [site.module.weight.shape for site in sites]
        return sum(
            self.prices.dense_cost(*shape, self.top(site)) if k is None else self.prices.factored(*shape, k)
            for site, shape, k in zip(sites, shapes, self.ranks(sites), strict=True)
        )

    def sizes(self, sites: list[Site]) -> tuple[int, int]:
        stored = trained = 0
        for site, k in zip(sites, self.ranks(sites), strict=True):
            m, n = site.module.weight.shape
            core = k or (self.top(site) if self.dense == "core_on_top_k" else 0)
            stored += core * (m + n) + core * core + (m * n if k is None else 0)
            trained += m * n if k is None and self.dense == "full" else core * core
        return stored, trained

    def rewrite(self, model: nn.Module, sites: list[Site], losses=None) -> None:
        for site, k in zip(sites, self.ranks(sites), strict=True):
            model.set_submodule(site.name, self.layer(site, k))
            del self._whole[site.name]

    def layer(self, site: Site, k: int | None) -> nn.Module:
        """At rank k; None: the dense layer, under the rule for those."""
        if k is not None:
            return factored(site.module, self.whole(site), k)
        if self.dense == "core_on_top_k":
            return dense_with_core(site.module, self.whole(site), self.top(site))
        site.module.weight.requires_grad_(self.dense == "full")
        return site.module
