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
from typing import Any, ClassVar

from torch import Tensor, nn

from recombine.core.method import Site, need
from recombine.linalg import weighted_svd
from recombine.methods.svd.low_rank import LowRank
from recombine.methods.svd.weighted import truncated


@dataclass(kw_only=True)
class Whitened(LowRank, abstract=True):
    """The base of whitened SVDs in which every layer has a rank of its own.

    Args:
        ratio: share of the weights of all target layers together that is kept.
    """

    ratio: float = 0.5

    budget_fields: ClassVar[dict[str, str]] = {"retained": "ratio", "memory": "ratio"}

    def check(self, sites: list[Site]) -> None:
        super().check(sites)
        need(0 < self.ratio <= 1, self, "ratio", "is a share of the weights, so it must lie in (0, 1]")
        least = self.budget_values("ratio", sites)[0]
        need(self.ratio >= least, self, "ratio", f"is less than rank 1 in every layer stores; from {least} on it fits")

    def budget_values(self, field: str, sites: list[Site]) -> list[float]:
        return self.ratios(sites)

    def statistics_needed(self) -> set[str]:
        return {"inputs"}

    def digest(self, group: list[Site]) -> dict[str, Tensor]:
        """u (m, k), with k the largest rank that saves weights, and s (N,), of W E[x x^T]^1/2 in float64."""
        (site,) = group
        u, s = weighted_svd(site.module.weight, self.stats[site.name].inputs.xx)
        return {"u": u[:, : self.max_rank(site)].clone(), "s": s}

    def left(self, site: Site) -> Tensor:
        """u of `digest`."""
        return self.digested([site])["u"]


@dataclass(kw_only=True)
class Balf(Whitened):
    """Chooses a rank for every layer, or leaves it dense, by a knapsack over output energies (arXiv 2509.25136).

    Args:
        fill: spend what one price for all layers leaves of the budget.
        as_paper: fields that have their default take those of the paper, which `paper` names.
    """

    fill: bool = True
    as_paper: bool = False

    paper: ClassVar[dict[str, Any]] = {"fill": False}

    def sizes(self, sites: list[Site]) -> tuple[int, int]:
        return self.stored(sites, self.ranks(sites)), 0

    def ranks(self, sites: list[Site]) -> list[int | None]:
        """The rank of every layer; None: it stays dense."""
        return self.spend(sites, list(map(self.options, sites)), self.ratio, self.fill)

    def rewrite(self, model: nn.Module, sites: list[Site], losses=None) -> None:
        for site, k in zip(sites, self.ranks(sites), strict=True):
            if k is not None:
                layer = truncated(site, self.left(site)[:, :k])
                self.finish([layer])
                self.kept.put(model, site.name, layer)
            self.kept.drop(site.name)
