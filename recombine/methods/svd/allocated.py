"""Ranks that may differ from layer to layer, for every method that truncates the spectra of layers one by one."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, ClassVar

from torch import Tensor, nn

from recombine.core.budget import Room
from recombine.core.calibration import Losses
from recombine.core.memory import device_of
from recombine.core.method import Site, need, need_losses
from recombine.layers import FactoredLinear
from recombine.methods.svd import lems, mixing, svd_llm_v2
from recombine.methods.svd.divergence import divergences
from recombine.methods.svd.low_rank import dims
from recombine.methods.svd.truncated import Truncated
from recombine.runtime import progress

MEASURED = ("lems", "atp")
ALLOCATIONS = ("uniform", "share", "error", "svd_llm_v2", *MEASURED, "mix")


@dataclass(kw_only=True)
class Allocated(Truncated, abstract=True):
    """The base of the methods whose ranks may differ from layer to layer.

    Args:
        allocation: of ranks. uniform: every layer keeps the same share. share, error: `ratio` is that of all layers
            together, and a layer may stay dense; what a rank loses counts as a share of the layer's energy, as in BALF,
            or as it is. svd_llm_v2 shares it out within each role (svd_llm_v2.py). lems weighs it by what cutting the
            layer does to the model's predictions, atp lets the share fall from block to block (lems.py); both look at
            data. mix chooses them together with the bits, under a budget of bytes (mixing.py).
        multiple_of: ranks under lems are multiples of it, in layers that have one.
        judged: calibration batches on which predictions are measured, under lems and atp; None: all.
    """

    allocation: str = "uniform"
    multiple_of: int = 8
    judged: int | None = None

    mixes: ClassVar[dict[str, Any]] = {"allocation": "mix"}

    def __post_init__(self):
        super().__post_init__()
        self._effects: list[lems.Effect] = []  # of the sites, under lems
        self._ranks: list[int | None] | None = None  # of the sites, once they are measured
        self._kind: str | None = None  # of the predictions, once they are measured

    @property
    def needs_trained_head(self) -> bool:
        """Whether predictions are measured."""
        return self.allocation in MEASURED

    @property
    def sizes_need_statistics(self) -> bool:
        """Whether ranks depend on spectra."""
        return self.allocation != "uniform"

    def check(self, sites: list[Site]) -> None:
        need(self.allocation in ALLOCATIONS, self, "allocation", f"must be one of {', '.join(ALLOCATIONS)}")
        super().check(sites)
        need(self.multiple_of >= 1, self, "multiple_of", "must be 1 or more")
        need(self.judged is None or self.judged >= 1, self, "judged", "must be 1 or more, or null for all batches")
        if self.allocation != "uniform":
            for name in self.conflicting_fields:
                why = f"chooses ranks, and so does {name}={getattr(self, name)}: drop one of them"
                need(getattr(self, name) is None, self, "allocation", why)
            least = self.budget_values("ratio", sites)[0]
            why = f"is less than the smallest ranks of all layers store; from {least} on it fits"
            need(self.ratio >= least, self, "ratio", why)

    def notes(self, sites: list[Site]) -> list[str]:
        why = "this model returns no logits, so what a cut costs is how far the loss moves, not a KL divergence"
        return super().notes(sites) + [f"allocation={self.allocation}: {why}"] * (self._kind == "loss")

    def budget_values(self, field: str, sites: list[Site]) -> list[float]:
        if self.allocation == "uniform":
            return super().budget_values(field, sites)
        return self.ratios(sites, [min(self.allowed(site), default=0) for site in sites])

    def allowed(self, site: Site) -> range:
        """The ranks that the layer may take, unless it stays dense."""
        return lems.steps(self.max_rank(site), self.multiple_of if self.allocation == "lems" else 1)

    def largest(self, site: Site) -> int:
        """The largest rank of the layer that may be needed."""
        return self.group_rank([site]) if self.allocation == "uniform" else self.max_rank(site)

    def ranks(self, sites: list[Site]) -> list[int | None]:
        """The rank of every layer; None: it stays dense."""
        if self.allocation == "uniform":
            return [None if self.stays_dense([site]) else self.group_rank([site]) for site in sites]
        if self.allocation in (*MEASURED, "mix"):
            assert self._ranks is not None
            return self._ranks
        if self.allocation == "svd_llm_v2":
            uniform = [self.whole_rank(*dims(site), self.ratio) for site in sites]
            errors = [float(self.spectrum(site)[k:].norm()) for site, k in zip(sites, uniform, strict=True)]
            return self.ranks_at(sites, svd_llm_v2.shares([site.role for site in sites], errors, self.ratio))
        relative = self.allocation == "share"
        found = [self.options(site, relative) for site in progress.of(sites, "factors", "layers")]
        return self.spend(sites, found, self.ratio)

    def before_budget(self, model: nn.Module, sites: list[Site], losses: Losses | None) -> None:
        self._ranks = None
        if self.allocation in MEASURED:
            need_losses(self, losses)
        if self.allocation == "lems":
            ranks = [min(lems.cut_rank(*dims(site)), self.max_rank(site)) for site in sites]
            cuts = [{site.name: self.pair(site, k)} if k else {} for site, k in zip(sites, ranks, strict=True)]
            room = self.memory.bytes(device_of(model)) // 2
            found, self._kind = divergences(model, cuts, self.judging(losses), room)
            self._effects = list(map(lems.Effect, found, ranks, lems.blocks_of(model, sites)[0]))

    def mix(self, model: nn.Module, sites: list[Site], room: Room, losses: Losses | None) -> dict[str, int | None]:
        need(self.allocation == "mix", self, "allocation", "chooses ranks without bits; say mix")
        need_losses(self, losses)
        found = mixing.choose(self, model, sites, room, losses)
        self._ranks = [one.rank for one in found]
        return {site.name: one.bits for site, one in zip(sites, found, strict=True)}

    def after_budget(self, model: nn.Module, sites: list[Site], losses: Losses | None) -> None:
        if self.allocation == "mix":
            why = "chooses ranks together with bits; say quantize.bits=auto budget=bytes_25"
            need(self._ranks is not None, self, "allocation", why)
        if self.allocation not in MEASURED:
            return
        found = self.choices(model, sites)
        if len(found) > 1:
            scores = [self.divergence(model, sites, ranks, losses) for ranks in progress.of(found, "ranks", "choices")]
            found = [found[scores.index(min(scores))]]
        self._ranks = found[0]

    def choices(self, model: nn.Module, sites: list[Site]) -> list[list[int | None]]:
        """The ranks of all layers, within the budget, of which the whole model's predictions decide."""
        budget = self.ratio * sum(site.module.weight.numel() for site in sites)
        blocks, count = lems.blocks_of(model, sites)
        if self.allocation == "atp":
            stored = partial(self.stored, sites)
            ranks = partial(self.ranks_at, sites)
            found = [lems.taper(blocks, count, beta, ranks, stored, budget) for beta in lems.betas(self.ratio)]
        else:
            options, allowed = [self.options(site) for site in sites], [self.allowed(site) for site in sites]
            found = []
            for alpha, gamma in lems.DEPTHS if self._kind == "token" else lems.DEPTHS[:1]:
                depth = lems.depths(count, alpha).tolist()
                scale = [1 + gamma * (0 if b is None else depth[b]) for b in blocks]
                found.append(lems.allocate(options, self._effects, allowed, scale, budget))
        return [ranks for i, ranks in enumerate(found) if ranks not in found[:i]]

    def ranks_at(self, sites: list[Site], shares: list[float]) -> list[int | None]:
        """The rank of every layer at a share of its own; None: it stays dense."""
        ranks = [self.whole_rank(*dims(site), share) for site, share in zip(sites, shares, strict=True)]
        kept = zip(sites, shares, ranks, strict=True)
        return [None if share >= 1 or k > self.max_rank(site) else k for site, share, k in kept]

    def divergence(self, model: nn.Module, sites: list[Site], ranks: list[int | None], losses: Losses) -> float:
        """What the whole model's predictions lose at these ranks."""
        cut = {site.name: self.pair(site, k) for site, k in zip(sites, ranks, strict=True) if k is not None}
        found, self._kind = divergences(model, [cut], self.judging(losses))
        return found[0]

    def judging(self, losses: Losses) -> Losses:
        """The losses of the batches on which predictions are measured."""
        return losses if self.judged is None else lambda: islice(losses(), self.judged)

    def sizes(self, sites: list[Site]) -> tuple[int, int]:
        if self.allocation in (*MEASURED, "mix") and self._ranks is None:  # the budget is not spent yet: at most this
            return int(self.ratio * sum(site.module.weight.numel() for site in sites)), 0
        return self.stored(sites, self.ranks(sites)), 0

    def rewrite(self, model: nn.Module, sites: list[Site], losses=None) -> None:
        for name, layer in self.factored(sites):
            self.finish([layer])
            self.kept.put(model, name, layer)

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
        return FactoredLinear(*self.pair(site, k), bias=site.module.bias)

    def pair(self, site: Site, k: int) -> tuple[Tensor, Tensor]:
        """left (m, k) and right (k, n) of a layer at rank k, in the type of its weight."""
        raise NotImplementedError(type(self).__name__)
