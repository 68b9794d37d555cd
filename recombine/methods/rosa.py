"""RoSA: robust adaptation, a low-rank and a sparse delta at once (arXiv 2401.04679).

W + (alpha / r) B A + S. Stored: W (m, n), left = B (m, r), right = A (r, n), and S by its `density` m n entries at
fixed places: those of the layer's largest mean squared gradients. Trains: B, A and the entries, r (m + n) +
round(density m n) a layer. B and S start at 0, A as in LoRA, so the model starts exactly as it was.

Paper: LoRA warms up alone for some steps, then gradients of that model make the mask. Here: the calibration gradients
of the pretrained model make it, before training, so that every run has its final parameters from the first step.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from recombine.layers import DeltaLinear
from recombine.methods.base import Method, Site, need


@dataclass(kw_only=True)
class Rosa(Method):
    """Args:
    rank: of the low-rank part; 0: none.
    alpha: its scale times the rank.
    density: share of the weight's entries that the sparse part trains; 0: none, then nothing is calibrated.
    """

    rank: int = 8
    alpha: float = 16.0
    density: float = 0.003

    knobs: ClassVar[dict[str, str]] = {"trainable": "rank", "memory": "rank"}

    def check(self, sites: list[Site]) -> None:
        most = min(min(site.linear.weight.shape) for site in sites)
        need(0 <= self.rank <= most, self, "rank", f"must be from 0 to {most}, the narrowest target layer")
        need(0 <= self.density <= 1, self, "density", "is a share of the entries, so it must lie in [0, 1]")
        if self.rank == 0:
            need(all(map(self.entries, sites)), self, "density", "with rank 0 a layer would train nothing; raise one")

    def wants(self) -> set[str]:
        return {"fisher"} if self.density else set()

    def choices(self, knob: str, sites: list[Site]) -> Sequence[int]:
        return range(0 if self.density else 1, 1 + min(min(site.linear.weight.shape) for site in sites))

    def entries(self, site: Site) -> int:
        """How many entries of the layer's weight the sparse part trains."""
        return round(self.density * site.linear.weight.numel())

    def sizes(self, sites: list[Site]) -> tuple[int, int]:
        trained = sum(self.rank * sum(site.linear.weight.shape) + self.entries(site) for site in sites)
        return sum(site.linear.weight.numel() for site in sites) + trained, trained

    def recombine(self, site: Site) -> DeltaLinear:
        weight, delta = site.linear.weight, {}
        m, n = weight.shape
        if self.rank:
            right = nn.init.kaiming_uniform_(weight.new_empty(self.rank, n), a=math.sqrt(5))
            delta = {"left": weight.new_zeros(m, self.rank), "right": right, "scale": self.alpha / self.rank}
        if count := self.entries(site):
            largest = self.stats[site.name].fisher.flatten().topk(count).indices
            delta |= {"entries": weight.new_zeros(count), "index": largest.sort().values}
        layer = DeltaLinear(weight, **delta, bias=site.linear.bias)
        for part in (layer.left, layer.right, layer.entries):
            if part is not None:
                part.requires_grad_(True)
        return layer
