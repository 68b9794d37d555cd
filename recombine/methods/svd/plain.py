"""Truncated SVD, the plainest compressor: W ~ U_k S_k V_k^T (Eckart & Young 1936).

A layer stores left = U_k S_k^1/2 (m, k) and right = S_k^1/2 V_k^T (k, n), and nothing trains. With `train_core` it
stores left = U_k, tail = s (k,) and right = V_k^T, and the k singular values train (CRISP Tab. 2, "SVD Eigenvalues").
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from recombine.core.method import Site, need
from recombine.layers import FactoredLinear
from recombine.linalg import energy_rank
from recombine.methods.svd.allocated import Allocated


@dataclass(kw_only=True)
class Svd(Allocated):
    """Truncates the SVD of every weight (Eckart & Young 1936).

    Args:
        ratio: share of a layer's weights that is kept.
        rank: the same k for all layers, instead of `ratio`.
        energy: instead of `ratio`, the smallest k of each layer that keeps this share of the squared singular values.
        train_core: the k singular values train.
    """

    energy: float | None = None
    train_core: bool = False

    budget_fields: ClassVar[dict[str, str]] = {"retained": "ratio", "energy": "energy", "memory": "ratio"}
    conflicting_fields: ClassVar[tuple[str, ...]] = ("rank", "energy")

    def check(self, sites: list[Site]) -> None:
        super().check(sites)
        if self.energy is not None:
            need(0 < self.energy <= 1, self, "energy", "is a share of the energy, so it must lie in (0, 1]")
        if self.train_core:
            why = "leaves layers dense, which have no singular values to train; drop train_core"
            need(self.allocation == "uniform", self, "allocation", why)
            why = "mixes the directions, and the singular values of each are to train; drop train_core"
            need(self.factor == "plain", self, "factor", why)

    def group_rank(self, group: list[Site]) -> int:
        if self.rank is None and self.energy is not None:
            return energy_rank(self.spectrum(group[0]), self.energy)
        return super().group_rank(group)

    def stays_dense(self, group: list[Site]) -> bool:
        return not self.train_core and super().stays_dense(group)

    def sizes(self, sites: list[Site]) -> tuple[int, int]:
        core = self.train_core * sum(self.group_rank([site]) for site in sites)
        return super().sizes(sites)[0] + core, core

    def layer(self, site: Site, k: int) -> FactoredLinear:
        if not self.train_core:
            return super().layer(site, k)
        (u, s, vh), weight = self.factors(site), site.module.weight
        layer = FactoredLinear(u[:, :k].to(weight), vh[:k].to(weight), tail=s[:k].to(weight), bias=site.module.bias)
        layer.tail.requires_grad_(True)
        return layer

    def pair(self, site: Site, k: int) -> tuple[Tensor, Tensor]:
        (u, s, vh), weight = self.factors(site), site.module.weight
        root = s[:k].sqrt()
        return (u[:, :k] * root).to(weight), (root[:, None] * vh[:k]).to(weight)
