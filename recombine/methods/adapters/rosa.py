"""RoSA: robust adaptation, a low-rank and a sparse delta at once (arXiv 2401.04679).

The weight is W + (alpha / r) B A + S. The base weight W (m, n) is frozen. B (m, r) is `left` and A (r, n) is `right`.
S has round(density m n) entries, where the layer's mean squared gradients are largest. B, A and the entries train:
r (m + n) + round(density m n) weights for each layer, stored beside W. B and S start at 0 and A as in LoRA, so the
model starts exactly as it was.

Paper: LoRA trains alone first, and the gradients of that model choose the entries. In its code training then begins
again with both parts at 0 (`warmup=64`: Adam on the calibration batches at `lr`). Here: the gradients of the pretrained
model choose the entries.
Paper's code: int(density m n) entries, and alpha 8 by default. Here: round(density m n), and 16.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from recombine.core.calibration import Losses, eval_frozen, passes
from recombine.core.digesting import calibrate
from recombine.core.method import Method, Site, need, need_losses
from recombine.layers import DeltaLinear
from recombine.methods.ranks import check_rank, rank_notes, widths


@dataclass(kw_only=True)
class Rosa(Method):
    """Adds a low-rank and a sparse delta to every weight; both train (arXiv 2401.04679).

    Args:
        rank: of the low-rank delta; 0: there is none.
        alpha: the low-rank delta is scaled by alpha / rank.
        density: share of the weight's entries that the sparse delta trains; 0: there is none, and no data is needed.
        warmup: steps that the low-rank delta trains alone before the entries are chosen; it starts anew afterwards.
        as_paper: fields that have their default take those of the paper, which `paper` names.
    """

    rank: int = 8
    alpha: float = 16.0
    density: float = 0.003
    warmup: int = 0
    as_paper: bool = False

    paper: ClassVar[dict[str, Any]] = {"warmup": 64}
    sizes_need_statistics: ClassVar[bool] = False
    budget_fields: ClassVar[dict[str, str]] = {"trainable": "rank", "memory": "rank"}

    def check(self, sites: list[Site]) -> None:
        check_rank(self, widths(sites), least=0)
        need(0 <= self.density <= 1, self, "density", "is a share of the entries, so it must lie in [0, 1]")
        need(self.warmup >= 0, self, "warmup", "must be 0 or more steps")
        need(not self.warmup or (self.rank and self.density), self, "warmup", "trains a low-rank part for a sparse one")
        if self.rank == 0:
            need(all(map(self.entries, sites)), self, "density", "with rank 0 a layer would train nothing; raise one")

    def notes(self, sites: list[Site]) -> list[str]:
        return rank_notes(self, widths(sites))

    def statistics_needed(self) -> set[str]:
        return {"fisher"} if self.density and not self.warmup else set()

    @property
    def needs_trained_head(self) -> bool:
        return self.warmup > 0

    def digest(self, group: list[Site]) -> dict[str, Tensor]:
        """index (entries,): where the layer's mean squared gradients are largest, ascending."""
        (site,) = group
        return {"index": self.stats[site.name].fisher.flatten().topk(self.entries(site)).indices.sort().values}

    def before_budget(self, model: nn.Module, sites: list[Site], losses: Losses | None) -> None:
        if self.warmup:
            need_losses(self, losses)

    def after_budget(self, model: nn.Module, sites: list[Site], losses: Losses | None) -> None:
        """The warm-up: collects squared gradients of a model whose low-rank deltas have trained for a while."""
        if not self.warmup:
            return
        parts = [self.low_rank(site.module.weight) for site in sites]
        trained = [part.requires_grad_() for pair in parts for part in pair]
        hooks = [
            site.module.register_forward_hook(
                lambda _, args, y, left=left, right=right: y + self.alpha / self.rank * (args[0] @ right.T) @ left.T
            )
            for site, (left, right) in zip(sites, parts, strict=True)
        ]
        optimizer = torch.optim.Adam(trained, lr=self.lr)
        try:
            with eval_frozen(model), torch.enable_grad():
                for loss in islice(passes(losses), self.warmup):
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
            for part in trained:
                part.requires_grad_(False)
            calibrate(model, self, sites, losses, {"fisher"})
        finally:
            for hook in hooks:
                hook.remove()

    def low_rank(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """left (m, r), which is 0, and right (r, n), Kaiming uniform, as LoRA starts."""
        rank = min(self.rank, *weight.shape)
        right = nn.init.kaiming_uniform_(weight.new_empty(rank, weight.shape[1]), a=math.sqrt(5))
        return weight.new_zeros(len(weight), rank), right

    def budget_values(self, field: str, sites: list[Site]) -> Sequence[int]:
        least = 0 if self.density and not self.warmup else 1
        return range(least, 1 + min(min(site.module.weight.shape) for site in sites))

    def entries(self, site: Site) -> int:
        """How many entries of the layer's weight the sparse delta trains."""
        return round(self.density * site.module.weight.numel())

    def sizes(self, sites: list[Site]) -> tuple[int, int]:
        shapes = [site.module.weight.shape for site in sites]
        trained = sum(min(self.rank, m, n) * (m + n) for m, n in shapes) + sum(map(self.entries, sites))
        return sum(site.module.weight.numel() for site in sites) + trained, trained

    def recombine(self, site: Site) -> DeltaLinear:
        weight, delta = site.module.weight, {}
        if self.rank:
            delta = dict(zip(("left", "right"), self.low_rank(weight), strict=True)) | {"scale": self.alpha / self.rank}
        if count := self.entries(site):
            delta |= {"entries": weight.new_zeros(count), "index": self.digested([site])["index"]}
        layer = DeltaLinear(weight, **delta, bias=site.module.bias)
        for part in (layer.left, layer.right, layer.entries):
            if part is not None:
                part.requires_grad_(True)
        return layer
