"""Truncated SVD, the plainest compressor: W ~ U_k S_k V_k^T (Eckart & Young 1936).

Stored: left = U_k S_k^1/2 (m, k), right = S_k^1/2 V_k^T (k, n). Trains: nothing, or with `train_core` the
k singular values ("SVD Eigenvalues" of CRISP, Tab. 2), then left = U_k, tail = s, right = V_k^T.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from recombine.layers import FactoredLinear
from recombine.linalg import energy_rank, svd
from recombine.methods.base import Method, Site, need


@dataclass(kw_only=True)
class Spectral(Method):
    """What the methods that factor each weight alone have in common: one SVD a layer, computed once."""

    compresses: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        self._factors: dict[str, tuple[Tensor, Tensor, Tensor]] = {}  # by site, for one model

    def factors(self, site: Site) -> tuple[Tensor, Tensor, Tensor]:
        """U (m, N), s (N,), Vh (N, n) in float64."""
        if site.name not in self._factors:
            self._factors[site.name] = svd(site.linear.weight)
        return self._factors[site.name]


@dataclass(kw_only=True)
class Svd(Spectral):
    """Args:
    ratio: weights kept per layer, k = ratio m n / (m + n).
    rank: the same k for all layers instead of `ratio`.
    energy: the smallest k that keeps this share of the squared singular values, instead of `ratio`.
    train_core: train the k singular values.
    """

    ratio: float = 0.5
    rank: int | None = None
    energy: float | None = None
    train_core: bool = False

    knobs: ClassVar[dict[str, str]] = {"retained": "ratio", "energy": "energy", "memory": "ratio"}
    rivals: ClassVar[tuple[str, ...]] = ("rank", "energy")

    def check(self, sites: list[Site]) -> None:
        need(0 < self.ratio <= 1, self, "ratio", "is a share of the weights, so it must lie in (0, 1]")
        if self.rank is not None:
            most = min(min(site.linear.weight.shape) for site in sites)
            need(1 <= self.rank <= most, self, "rank", f"must be from 1 to {most}, the narrowest target layer")
        if self.energy is not None:
            need(0 < self.energy <= 1, self, "energy", "is a share of the energy, so it must lie in (0, 1]")

    def choices(self, knob: str, sites: list[Site]) -> list[float]:
        return [i / 1000 for i in range(1, 1001)]

    def layer_rank(self, site: Site) -> int:
        m, n = site.linear.weight.shape
        if self.rank is not None:
            return self.rank
        if self.energy is not None:
            return energy_rank(self.factors(site)[1], self.energy)
        return max(1, int(self.ratio * m * n / (m + n)))

    def sizes(self, sites: list[Site]) -> tuple[int, int]:
        ranks = [self.layer_rank(site) for site in sites]
        stored = sum(k * sum(site.linear.weight.shape) for k, site in zip(ranks, sites, strict=True))
        return stored + self.train_core * sum(ranks), self.train_core * sum(ranks)

    def recombine(self, site: Site) -> FactoredLinear:
        u, s, vh = self.factors(site)
        k, weight, bias = self.layer_rank(site), site.linear.weight, site.linear.bias
        if self.train_core:
            layer = FactoredLinear(u[:, :k].to(weight), vh[:k].to(weight), tail=s[:k].to(weight), bias=bias)
            layer.tail.requires_grad_(True)
            return layer
        root = s[:k].sqrt()
        return FactoredLinear((u[:, :k] * root).to(weight), (root[:, None] * vh[:k]).to(weight), bias=bias)
