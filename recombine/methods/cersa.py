"""CERSA: cumulative energy-retaining subspace adaptation (arXiv 2605.08174, Eq. 1-4).

W = U S V^T in float64. k_alpha and k_beta are the smallest ranks that hold the shares alpha and beta of the energy, the
sum of squared singular values (Eq. 2). W becomes U_p blockdiag(S_p, diag(s[k_beta:k_alpha])) V_p^T.
U_p (m, k_alpha), V_p (n, k_alpha) and the diagonal are frozen. S_p (k_beta, k_beta) is dense and starts as
diag(s[:k_beta]); it alone trains. A layer stores k_alpha (m + n) + k_beta^2 + (k_alpha - k_beta) weights.

The paper's ablations are fields: `targets` (Tab. 2), `part` with `trained_share=0.5` (Tab. 3), alpha and beta (Tab. 4,
10), `rank` for all layers alike (Tab. 5), `core` (Tab. 6).

`factor=pivot` stores k_alpha^2 weights less, where one dense core holds all kept directions (k_beta = k_alpha): k
columns of the right factor become the identity, and what they were goes into the core. The same weights can be reached,
from the same start; the core's entries are others, so an optimizer takes another path.

Paper: in the text the trainable block has rank k_alpha. Here: k_beta, as its Table 14 implies. The frozen rest is a
diagonal, as its memory at (0.95, 0.9) implies.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from recombine.core.method import Site, need
from recombine.layers import FactoredLinear
from recombine.linalg import energy_rank
from recombine.methods.ranks import check_rank, rank_notes, widths
from recombine.methods.svd.low_rank import FACTORS, pivot
from recombine.methods.svd.spectral import Spectral, directions
from recombine.runtime import progress


@dataclass(kw_only=True)
class Cersa(Spectral):
    """Keeps the principal subspace of every weight and trains a core inside it (arXiv 2605.08174, Eq. 1-4).

    Args:
        alpha: share of the energy that is kept, in (0, 1].
        beta: share of the energy whose directions train, at most alpha; None: alpha.
        rank: k_alpha = k_beta = rank in every layer, instead of both shares.
        trained_share: k_beta is this share of k_alpha, instead of `beta`.
        part: top trains the directions of the largest singular values, bottom those of the smallest that are kept.
        core: matrix trains a dense core on those directions, array only its diagonal.
        factor: plain stores both outer factors whole; pivot stores k^2 weights less, where all that is kept trains.
    """

    targets: tuple[str, ...] = ("q", "k", "v")
    alpha: float = 0.95
    beta: float | None = None
    rank: int | None = None
    trained_share: float | None = None
    part: str = "top"
    core: str = "matrix"
    factor: str = "plain"

    budget_fields: ClassVar[dict[str, str]] = {
        "energy": "alpha",
        "retained": "alpha",
        "memory": "alpha",
        "trainable": "beta",
    }
    conflicting_fields: ClassVar[tuple[str, ...]] = ("rank",)

    def check(self, sites: list[Site]) -> None:
        for name in ("alpha", "beta", "trained_share"):
            if (value := getattr(self, name)) is not None:
                need(0 < value <= 1, self, name, "is a share, so it must lie in (0, 1]")
        if self.beta is not None:
            need(
                self.beta <= self.alpha, self, "beta", f"only kept directions can train, so at most alpha={self.alpha}"
            )
            need(self.trained_share is None, self, "trained_share", "sets what trains, and so does beta: drop one")
        if self.rank is not None:
            check_rank(self, widths(sites))
        need(self.part in ("top", "bottom"), self, "part", "must be top or bottom")
        need(self.core in ("matrix", "array"), self, "core", "must be matrix or array")
        need(self.factor in FACTORS, self, "factor", f"must be one of {', '.join(FACTORS)}")
        if self.factor == "pivot":
            whole = self.core == "matrix" and self.beta is None and self.trained_share is None
            why = (
                "mixes the kept directions, so one dense core must hold all of them; drop beta, trained_share and core"
            )
            need(whole, self, "factor", why)

    def notes(self, sites: list[Site]) -> list[str]:
        return rank_notes(self, widths(sites))

    def budget_values(self, field: str, sites: list[Site]) -> list[float]:
        top = round(1000 * (self.alpha if field == "beta" else 1))
        bottom = 1 if field == "beta" or self.beta is None else round(1000 * self.beta)
        return [i / 1000 for i in range(bottom, top + 1)]

    def ranks(self, site: Site) -> tuple[int, int]:
        """The ranks (k_alpha, k_beta) of a layer."""
        s = None if self.rank is not None else self.spectrum(site)
        kept = energy_rank(s, self.alpha) if self.rank is None else min(self.rank, directions(site))
        if self.trained_share is not None:
            return kept, max(1, int(self.trained_share * kept))
        return kept, kept if self.beta is None or self.rank is not None else energy_rank(s, self.beta)

    def sizes(self, sites: list[Site]) -> tuple[int, int]:
        ranks = [self.ranks(site) for site in progress.of(sites, "factors", "layers")]
        trained = sum(kb * kb if self.core == "matrix" else kb for _, kb in ranks)
        outer = sum(ka * sum(site.module.weight.shape) + ka - kb for (ka, kb), site in zip(ranks, sites, strict=True))
        saved = sum(k * k for k, _ in ranks) if self.factor == "pivot" else 0
        return outer + trained - saved, trained

    def recombine(self, site: Site) -> FactoredLinear:
        u, s, vh = self.factors(site)
        (ka, kb), weight = self.ranks(site), site.module.weight
        order = torch.arange(ka, device=s.device)
        if self.part == "bottom":
            order = order.roll(kb)  # the trained directions come first
        u, s, vh = u[:, order].to(weight), s[order].to(weight), vh[order].to(weight)
        core, tail = s[:kb], s[kb:] if ka > kb else None
        if self.core == "matrix":
            core = torch.diag(core)
        layer = FactoredLinear(left=u, right=vh, core=core, tail=tail, bias=site.module.bias)
        layer.core.requires_grad_(True)
        if self.factor == "pivot":
            pivot([layer])
        return layer
