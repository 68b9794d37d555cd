"""How CRISP shares bases: which layers share one, its size, and what that stores (see method.py)."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from typing import ClassVar

from recombine.core.method import Method, need
from recombine.core.sites import Site, consecutive
from recombine.linalg import energy_rank
from recombine.methods.crisp.closed_form import spectrum, stack
from recombine.runtime.open_fields import OPEN

LARGE, SMALL = OPEN  # what fields that are None stand for: at the exact size, and under a budget of what is stored


@dataclass(kw_only=True)
class SharedBases(Method, abstract=True):
    """The part of CRISP that decides groups and sizes.

    Args:
        chunk: length s of the pieces that rows are cut into. Layers whose width it does not divide take the nearest
            divisor. None: 128 where a budget limits what is stored, else 32.
        group_size: how many consecutive layers of a role share a basis. None: 1 where a budget limits what is stored,
            else 2.
        basis_rank: columns r of a basis, at most group_size * chunk; None: that many, which is exact.
        energy: instead of `basis_rank`, the smallest rank of each group that keeps this share of the squared singular
            values, in (0, 1].
    """

    targets: tuple[str, ...] = ("qkv", "o", "up", "down", "gate?")
    chunk: int | None = None
    group_size: int | None = None
    basis_rank: int | None = None
    energy: float | None = None

    compresses: ClassVar[bool] = True
    sizes_need_statistics: ClassVar[bool] = False
    conflicting_fields: ClassVar[tuple[str, ...]] = ("basis_rank", "energy")
    budget_fields: ClassVar[dict[str, str]] = {
        "retained": "basis_rank",
        "memory": "basis_rank",
        "energy": "energy",
        "trainable": "chunk",
    }

    @property
    def nearest(self) -> int:
        """The chunk that widths take if they can."""
        return LARGE["chunk"] if self.chunk is None else self.chunk

    @property
    def layers_a_group(self) -> int:
        """How many consecutive layers of a role share a basis."""
        return LARGE["group_size"] if self.group_size is None else self.group_size

    def check(self, sites: list[Site]) -> None:
        need(self.layers_a_group >= 1, self, "group_size", "a group has at least one layer")
        need(self.nearest >= 1, self, "chunk", "a chunk has at least one entry")
        widths = {site.module.in_features: site.name for site in reversed(sites)}
        typed = self.nearest not in (LARGE["chunk"], SMALL["chunk"])  # for another model, it seems
        if typed and all(width % self.nearest for width in widths):
            width, name = next(reversed(widths.items()))
            near = self.chunk_of(width)
            need(False, self, "chunk", f"does not divide {name}'s width {width}, nor any other's; {near} does")
        if self.basis_rank is not None:
            most = self.layers_a_group * max(map(self.chunk_of, widths))
            why = f"must be from 1 to group_size * chunk = {most}, where the model is exact"
            need(1 <= self.basis_rank <= most, self, "basis_rank", why)
        if self.energy is not None:
            need(0 < self.energy <= 1, self, "energy", "is a share of the energy, so it must lie in (0, 1]")

    def notes(self, sites: list[Site]) -> list[str]:
        roles = defaultdict(dict)  # as sets, in order
        for site in sites:
            roles[site.module.in_features][site.role] = None
        near = self.nearest
        other = [f"{self.chunk_of(w)} for {w} ({' '.join(r)})" for w, r in roles.items() if w % near]
        return [f"method.chunk={near} does not divide every width; instead: {', '.join(other)}"] if other else []

    def chunk_of(self, width: int) -> int:
        """The chunk s of the layers of that width: the divisor that is nearest to `chunk`."""
        near = self.nearest
        return near if width % near == 0 else min(divisors(width), key=lambda d: abs(d - near))

    def group_chunk(self, group: list[Site]) -> int:
        """The chunk s of a group's layers, which have one shape."""
        return self.chunk_of(group[0].module.in_features)

    def budget_values(self, field: str, sites: list[Site]) -> Sequence[int]:
        if field == "basis_rank":
            return range(1, self.layers_a_group * max(self.chunk_of(site.module.in_features) for site in sites) + 1)
        return divisors(gcd(*(site.module.in_features for site in sites)))

    def groups(self, sites: list[Site]) -> list[list[Site]]:
        """The layers that share a basis, group by group."""
        return consecutive(sites, lambda role: self.layers_a_group)

    def group_rank(self, group: list[Site]) -> int:
        """The columns r of a group's basis."""
        chunk = self.group_chunk(group)
        most = len(group) * chunk
        if self.energy is not None:
            return energy_rank(spectrum(stack(group, chunk))[0].sqrt(), self.energy)
        return most if self.basis_rank is None else min(self.basis_rank, most)

    def sizes(self, sites: list[Site]) -> tuple[int, int]:
        bases = mixers = 0
        for group in self.groups(sites):
            rank, chunk = self.group_rank(group), self.group_chunk(group)
            mixers += len(group) * rank * chunk
            bases += group[0].module.weight.numel() // chunk * rank
        return bases + mixers, mixers


def divisors(width: int) -> list[int]:
    """All divisors of a number, ascending."""
    return [d for d in range(1, width + 1) if width % d == 0]
