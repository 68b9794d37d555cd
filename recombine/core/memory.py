"""How calibration keeps to a limit of memory: several passes, each for as many layers as their sums fit.

Of the limit, a quarter is for what a method keeps of layers that wait (`kept.py`). The rest holds the running sums of
one pass and the work on one layer. The model itself, its activations and its gradients come on top.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from recombine.core.kept import Kept
from recombine.core.sites import Site, source
from recombine.errors import UsageError
from recombine.runtime import memory

SHARE = 0.5  # of the free memory, where no limit is given
KEPT = 0.25  # of the limit
WORK = 2  # float64 matrices as wide as the widest layer that work on one layer takes; three times that with gradients


@dataclass(frozen=True)
class Memory:
    """What the statistics and factors of `apply` may take beside the model.

    Args:
        limit: bytes; None: half of what is free when `apply` begins.
        folder: where factors lie that do not fit; it is removed at the end. A killed process's files there are used
            again: call `apply` on the same model with the same losses. None: a temporary folder.
        key: what errors call the limit.
    """

    limit: int | None = None
    folder: Path | None = None
    key: str = "memory"

    @classmethod
    def of(cls, given: "Memory | str | None") -> "Memory":
        """The memory that a caller gave: itself, that of a word such as 8gb, or what is free.

        Raises:
            UsageError: no such word.
        """
        return given if isinstance(given, Memory) else cls(memory.parse("auto" if given is None else given, cls.key))

    def bytes(self, device: torch.device) -> int:
        """The limit in bytes."""
        return int(SHARE * memory.free(device)) if self.limit is None else self.limit

    def store(self, device: torch.device, part: str = "") -> Kept:
        """An empty store for what waits; another one, with files of its own, for each part."""
        return Kept(int(KEPT * self.bytes(device)), self.folder and self.folder / part)

    def passes(self, groups: list[list[Site]], kinds: set[str], device: torch.device) -> list[list[list[Site]]]:
        """The groups of layers, pass by pass. Layers that read the same input are in one pass.

        Args:
            groups: layers that the method digests together.
            kinds: of statistics.

        Raises:
            UsageError: the limit that was given does not hold one layer.
        """
        work = at_work(groups, kinds)
        room = (1 - KEPT) * self.bytes(device) - work
        units = [(unit, sums([site for group in unit for site in group], kinds)) for unit in joined(groups)]
        largest, most = max(units, key=lambda pair: pair[1], default=([], 0))
        if most > room and self.limit is not None:
            need = memory.shown((most + work) / (1 - KEPT))
            what = f"{largest[0][0].name} and the layers that go with it need {need}"
            raise UsageError(f"{self.key}={memory.shown(self.limit)}: {what}; say {self.key}={need} or more")
        passes, left = [], 0.0
        for unit, size in units:
            if not passes or size > left:
                passes.append([])
                left = room
            passes[-1] += unit
            left -= size
        return passes

    def holds(self, parts: list[list[Site]], kinds: set[str], device: torch.device) -> bool:
        """Whether the sums of each part fit, beside factors and hidden states that wait."""
        room = (1 - 2 * KEPT) * self.bytes(device) - at_work(parts, kinds)
        return max((sums(part, kinds) for part in parts), default=0) <= room


def at_work(groups: list[list[Site]], kinds: set[str]) -> int:
    """Bytes that the work on the widest layer takes."""
    widest = max((max(site.module.weight.shape) for group in groups for site in group), default=0)
    return 8 * WORK * (3 if "outputs" in kinds else 1) * widest**2


def joined(groups: list[list[Site]]) -> list[list[list[Site]]]:
    """The groups, those together that have layers with the same input."""
    units: list[list[list[Site]]] = []
    places: dict[tuple[str, str], list[list[Site]]] = {}  # input -> the unit that reads it
    for group in groups:
        unit = [group]
        for other in {id(u): u for site in group if (u := places.get(source(site))) is not None}.values():
            unit = other + unit
            units = [u for u in units if u is not other]
        units.append(unit)
        places |= {source(site): unit for part in unit for site in part}
    return units


def sums(sites: list[Site], kinds: set[str]) -> int:
    """Bytes of the layers' running sums in float64."""
    total = 0
    for n in {source(site): site.module.weight.shape[1] for site in sites}.values():
        total += ("inputs" in kinds) * n * n + len(kinds & {"mean", "magnitudes"}) * n
    for m, n in (site.module.weight.shape for site in sites):
        total += ("outputs" in kinds) * m * m + bool(kinds & {"cross", "fisher"}) * m * n  # dL/dW of a batch
        total += ("cross" in kinds) * m * n + ("fisher" in kinds) * m * n
    return 8 * total


def device_of(model: nn.Module) -> torch.device:
    """Where the model's parameters lie, the first of them at least."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))
