"""CERSA: cumulative energy-retaining subspace adaptation (arXiv 2605.08174, Eq. 1-4).

W = U S V^T in float64. k_alpha and k_beta are the smallest ranks that hold the shares alpha and beta of the
squared singular values (Eq. 2). Kept: U_p (m, k_alpha) and V_p (n, k_alpha), frozen; the core
blockdiag(S_p, diag(s[k_beta:k_alpha])) with S_p (k_beta, k_beta) dense, starting as diag(s[:k_beta]).
Trains: S_p alone. Stores k_alpha (m + n) + k_beta^2 + (k_alpha - k_beta) per layer.

Paper: the text's rank of the trainable block reads k_alpha. Here: k_beta, which its Table 14 implies, with the
frozen middle part a diagonal, which its memory of (0.95, 0.9) implies.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from recombine.layers import FactoredLinear
from recombine.linalg import energy_rank
from recombine.methods.base import Site, need
from recombine.methods.svd import Spectral


@dataclass(kw_only=True)
class Cersa(Spectral):
    """Args:
    alpha: share of the energy that is kept, in (0, 1].
    beta: share that trains, at most alpha; None: alpha.
    """

    targets: tuple[str, ...] = ("q", "k", "v")
    alpha: float = 0.95
    beta: float | None = None

    knobs: ClassVar[dict[str, str]] = {"energy": "alpha", "retained": "alpha", "memory": "alpha", "trainable": "beta"}

    def check(self, sites: list[Site]) -> None:
        need(0 < self.alpha <= 1, self, "alpha", "is a share of the energy, so it must lie in (0, 1]")
        if self.beta is not None:
            need(0 < self.beta <= 1, self, "beta", "is a share of the energy, so it must lie in (0, 1]")
            need(self.beta <= self.alpha, self, "beta", f"only kept directions can train, so at most {self.alpha=}")

    def choices(self, knob: str, sites: list[Site]) -> list[float]:
        top = round(1000 * (self.alpha if knob == "beta" else 1))
        bottom = 1 if knob == "beta" or self.beta is None else round(1000 * self.beta)
        return [i / 1000 for i in range(bottom, top + 1)]

    def ranks(self, site: Site) -> tuple[int, int]:
        """(k_alpha, k_beta)."""
        s = self.factors(site)[1]
        return energy_rank(s, self.alpha), energy_rank(s, self.alpha if self.beta is None else self.beta)

    def sizes(self, sites: list[Site]) -> tuple[int, int]:
        ranks = [self.ranks(site) for site in sites]
        trained = sum(kb * kb for _, kb in ranks)
        outer = sum(ka * sum(site.linear.weight.shape) + ka - kb for (ka, kb), site in zip(ranks, sites, strict=True))
        return outer + trained, trained

    def recombine(self, site: Site) -> FactoredLinear:
        u, s, vh = self.factors(site)
        (ka, kb), weight = self.ranks(site), site.linear.weight
        layer = FactoredLinear(
            left=u[:, :ka].to(weight),
            right=vh[:ka].to(weight),
            core=torch.diag(s[:kb]).to(weight),
            tail=s[kb:ka].to(weight) if ka > kb else None,
            bias=site.linear.bias,
        )
        layer.core.requires_grad_(True)
        return layer
