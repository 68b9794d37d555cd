"""What methods share that factor weights by their spectra."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from recombine.core.method import Method, Site
from recombine.linalg import svd
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
            self.kept.put(model, site.name, self.recombine(site))
            self.kept.drop(site.name)


def directions(site: Site) -> int:
    """The number of a layer's singular values, N = min(m, n)."""
    return min(site.module.weight.shape)
