"""JACTUS: joint adaptation and compression with a task-aware union of subspaces (arXiv 2605.02829, Alg. 1).

Calibration gives C_x = E[x x^T] and C_g = E[g g^T] with g = dL/dy. Each is shrunk (Ledoit & Wolf 2004) and scaled to a
mean eigenvalue of 1. Inside a union of subspaces of W, C_x and C_g (union.py), the W_k of rank k minimises
|C_g^1/2 (W - W_k) C_x^1/2|_F. Ranks are allocated over all layers by marginal gain per weight (rank_options.py).
Orthonormal left (m, k) and right (k, n) are frozen; the dense core (k, k) between them trains. A layer stores
k (m + n) + k^2 weights. After training the core folds away, which leaves k (m + n). `factor=pivot` stores k^2 less of
both: k columns of right become the identity, and what they were goes into the core. The same weights can be reached,
from the same start; the core's entries are others, so an optimizer takes another path.

Ablation: `sensitivity=none` uses no gradients, C_g = I without U_g. With alpha = 1, W_k is then the whitened SVD; with
`relative=true` and `allocation=lagrangian`, ranks are chosen as in BALF. Paper: has neither.

The paper was read from its abstract, figures and reviews; its code was not at hand.
Paper: the caption gives the gradient directions to the input side. Here: C_g weighs the output side, where g lives.
Paper: no values of alpha, beta, gamma. Here: large ones, since only the calibration pays for a wide union. The values
0.95, 0.99, 0.99 lose accuracy (experiments/LOG.md).
Paper: every layer is factored (`dense=none`). Here: a layer may stay dense where that is cheaper.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from recombine.core.method import Site, need
from recombine.methods.allocation import greedy, lagrangian
from recombine.methods.jactus.rank_options import Prices
from recombine.methods.jactus.subspaces import Subspaces
from recombine.methods.jactus.union import dense_with_core, factored
from recombine.methods.svd.low_rank import FACTORS, pivot
from recombine.runtime import progress

SPEND = {"greedy": greedy, "lagrangian": lagrangian}
CHOICES = {
    "counted": ("stored", "deployed"),
    "allocation": tuple(SPEND),
    "factor": tuple(FACTORS),
    "dense": ("none", "frozen", "full", "core_on_top_k"),
}


@dataclass(kw_only=True)
class Jactus(Subspaces):
    """Compresses each weight inside a task-aware union of subspaces and trains a core there (arXiv 2605.02829, Alg. 1).

    `Subspaces` has the fields that say what the unions are made of.

    Args:
        ratio: share of the target layers' weights that is kept.
        counted: what `ratio` counts: stored, the core's k^2 as well; deployed, what is left once the core folds away.
        allocation: of ranks: greedy (the paper's) or lagrangian.
        relative: a layer's gains count as shares of their sum, not as they are.
        dense: what a layer that stays dense trains: frozen, nothing; full, itself; core_on_top_k, a core on its top
            directions. none: no layer stays dense.
        top_k: the size k of the core under core_on_top_k.
        factor: plain stores both outer factors whole; pivot stores k^2 weights less, for the same layer.
        as_paper: fields that have their default take those of the paper, which `paper` names.
    """

    ratio: float = 0.8
    counted: str = "stored"
    allocation: str = "greedy"
    relative: bool = False
    dense: str = "core_on_top_k"
    top_k: int = 32
    factor: str = "plain"
    as_paper: bool = False

    paper: ClassVar[dict[str, Any]] = {"dense": "none"}
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
        """How layers are counted, by `counted`, `dense`, `top_k` and `factor`."""
        return Prices(self.counted == "stored", self.dense, self.top_k, self.factor == "pivot")

    def budget_values(self, field: str, sites: list[Site]) -> list[float]:
        dense = sum(site.module.weight.numel() for site in sites)
        least = sum(self.prices.factored(*site.module.weight.shape, 1) for site in sites) / dense
        return [i / 1000 for i in range(int(1000 * least) + 1, 1001)]

    def widest(self, site: Site) -> int:
        return max(self.prices.max_rank(*site.module.weight.shape), self.top_k)

    def top(self, site: Site) -> int:
        """The size of the core beside a layer that stays dense."""
        return min(self.top_k, int(self.digested([site])["width"]))

    def ranks(self, sites: list[Site]) -> list[int | None]:
        """The rank of every layer; None: it stays dense."""
        shapes = [site.module.weight.shape for site in sites]
        found = [self.digested([site]) for site in progress.of(sites, "factors", "layers")]
        options = [
            self.prices.options(*shape, one["gains"], int(one["width"]), self.relative)
            for shape, one in zip(shapes, found, strict=True)
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
            pivots = k * k if self.factor == "pivot" and k is not None else 0
            stored += core * (m + n) + core * core - pivots + (m * n if k is None else 0)
            trained += m * n if k is None and self.dense == "full" else core * core
        return stored, trained

    def rewrite(self, model: nn.Module, sites: list[Site], losses=None) -> None:
        for site, k in zip(sites, self.ranks(sites), strict=True):
            self.kept.put(model, site.name, self.layer(site, k))
            self.kept.drop(site.name)

    def layer(self, site: Site, k: int | None) -> nn.Module:
        """The new layer at rank k; None: the dense layer, with what `dense` lets it train."""
        if k is not None:
            layer = factored(site.module, self.whole(site), k)
            if self.factor == "pivot":
                pivot([layer])
            return layer
        if self.dense == "core_on_top_k":
            return dense_with_core(site.module, self.whole(site), self.top(site))
        site.module.weight.requires_grad_(self.dense == "full")
        return site.module
