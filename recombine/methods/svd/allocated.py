"""Ranks that may differ from layer to layer, for every method that truncates the spectra of layers one by one."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from recombine.core.method import Site, need
from recombine.layers import FactoredLinear
from recombine.methods.svd.truncated import Truncated
from recombine.runtime import progress

ALLOCATIONS = ("uniform", "share", "error")


@dataclass(kw_only=True)
class Allocated(Truncated, abstract=True):
    """The base of the methods whose ranks may differ from layer to layer.

    Args:
        allocation: of ranks. uniform: every layer keeps the same share. share, error: `ratio` is that of all layers
            together, and a layer may stay dense; what a rank loses counts as a share of the layer's energy, as in BALF,
            or as it is.
    """

    allocation: str = "uniform"

    @property
    def sizes_need_statistics(self) -> bool:
        """Whether ranks depend on spectra."""
        return self.allocation != "uniform"

    def check(self, sites: list[Site]) -> None:
        need(self.allocation in ALLOCATIONS, self, "allocation", f"must be one of {', '.join(ALLOCATIONS)}")
        super().check(sites)
        if self.allocation != "uniform":
            for name in self.conflicting_fields:
                why = f"chooses ranks, and so does {name}={getattr(self, name)}: drop one of them"
                need(getattr(self, name) is None, self, "allocation", why)
            least = self.budget_values("ratio", sites)[0]
            why = f"is less than rank 1 in every layer stores; from {least} on it fits"
            need(self.ratio >= least, self, "ratio", why)

    def budget_values(self, field: str, sites: list[Site]) -> list[float]:
        return super().budget_values(field, sites) if self.allocation == "uniform" else self.ratios(sites)

    def largest(self, site: Site) -> int:
        """The largest rank of the layer that may be needed."""
        return self.group_rank([site]) if self.allocation == "uniform" else self.max_rank(site)

    def ranks(self, sites: list[Site]) -> list[int | None]:
        """The rank of every layer; None: it stays dense."""
        if self.allocation == "uniform":
            return [None if self.stays_dense([site]) else self.group_rank([site]) for site in sites]
        relative = self.allocation == "share"
        found = [self.options(site, relative) for site in progress.of(sites, "factors", "layers")]
        return self.spend(sites, found, self.ratio)

    def sizes(self, sites: list[Site]) -> tuple[int, int]:
        return self.stored(sites, self.ranks(sites)), 0

    def rewrite(self, model: nn.Module, sites: list[Site], losses=None) -> None:
        for name, layer in self.factored(sites):
            self.finish([layer])
            model.set_submodule(name, layer)

    def factored(self, sites: list[Site]) -> Iterator[tuple[str, FactoredLinear]]:
        """The new layers, (site name, layer) one by one; one that stays dense is left out."""
        for site, k in zip(progress.of(sites, "rewriting", "layers"), self.ranks(sites), strict=True):
            if k is not None:
                yield site.name, self.recombine(site) if self.allocation == "uniform" else self.layer(site, k)
            self.kept.drop(site.name)

    def recombine(self, site: Site) -> FactoredLinear:
        return self.layer(site, self.group_rank([site]))

    def layer(self, site: Site, k: int) -> FactoredLinear:
        """The layer at rank k."""
        raise NotImplementedError(type(self).__name__)
