"""PC-LoRA: the pretrained weight fades out while a low-rank one learns to do without it (arXiv 2406.09117).

y = f W x + left right x + b. The base weight W (m, n) is frozen. left (m, k), which starts at 0, right (k, n), which
starts Kaiming uniform, and the bias b train. In the distillation f falls from 1 to 0 over the first share `decay` of
the steps. With u the share of that fall that is done, f = 1 - sin(pi u / 2) (sine), 1 - u (linear) or cos(pi u / 2)
(cosine). When the distillation ends W is dropped. A layer stores m n + k (m + n) weights until then, which a memory
budget limits, and k (m + n) afterwards, which a retained budget limits.

Paper: f multiplies the old bias too, and a new one starts at 0 (`fade_bias=true`: the one bias moves by as much before
every step, which is the same but for weight decay). Here: the bias trains from its pretrained value, which can reach
the same. Norms train in the distillation too.
Paper: its decay share was not at hand. Here: 0.8 and the sine, as in a reimplementation; right starts as in LoRA.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from recombine.core.method import Method, Site, need
from recombine.errors import UsageError
from recombine.layers import DeltaLinear, FactoredLinear
from recombine.methods.low_rank import last_layers, low_rank
from recombine.methods.ranks import check_rank, rank_notes, widths

SCHEDULES = {
    "sine": lambda u: 1 - math.sin(math.pi * u / 2),
    "linear": lambda u: 1 - u,
    "cosine": lambda u: math.cos(math.pi * u / 2),
}


@dataclass(kw_only=True)
class PcLora(Method):
    """Fades every base weight out while a low-rank weight learns to replace it (arXiv 2406.09117).

    Args:
        ratio: share of a layer's weights that is kept in the end, k = ratio m n / (m + n).
        rank: the same k for all layers, instead of `ratio`.
        decay: share of the distillation's steps over which the base weights fade out, in (0, 1].
        schedule: of the factor f: sine, linear or cosine.
        fade_bias: the pretrained biases fade out too.
        as_paper: fields that have their default take those of the paper, which `paper` names.
    """

    targets: tuple[str, ...] = ("qkv", "o", "up", "down", "gate?")
    ratio: float = 0.5
    rank: int | None = None
    decay: float = 0.8
    schedule: str = "sine"
    fade_bias: bool = False
    as_paper: bool = False

    paper: ClassVar[dict[str, Any]] = {"fade_bias": True}
    compresses: ClassVar[bool] = True
    budget_fields: ClassVar[dict[str, str]] = {"retained": "ratio", "memory": "ratio"}
    conflicting_fields: ClassVar[tuple[str, ...]] = ("rank",)

    def check(self, sites: list[Site]) -> None:
        need(0 < self.ratio <= 1, self, "ratio", "is a share of the weights, so it must lie in (0, 1]")
        if self.rank is not None:
            check_rank(self, widths(sites))
        need(0 < self.decay <= 1, self, "decay", "is a share of the distillation, so it must lie in (0, 1]")
        need(self.schedule in SCHEDULES, self, "schedule", f"must be one of {', '.join(SCHEDULES)}")

    def notes(self, sites: list[Site]) -> list[str]:
        return rank_notes(self, widths(sites))

    def budget_values(self, field: str, sites: list[Site]) -> list[float]:
        return [i / 1000 for i in range(1, 1001)]

    def layer_rank(self, linear: nn.Module) -> int:
        """The rank k of a layer."""
        m, n = linear.weight.shape
        return max(1, int(self.ratio * m * n / (m + n))) if self.rank is None else min(self.rank, m, n)

    def retained_weights(self, sites: list[Site]) -> int:
        return sum(self.layer_rank(site.module) * sum(site.module.weight.shape) for site in sites)

    def sizes(self, sites: list[Site]) -> tuple[int, int]:
        trained = self.retained_weights(sites)
        return sum(site.module.weight.numel() for site in sites) + trained, trained

    def recombine(self, site: Site) -> DeltaLinear:
        layer = low_rank(site.module, self.layer_rank(site.module))
        if self.fade_bias and layer.bias is not None:
            layer.register_buffer("faded_bias", layer.bias.detach().clone())
        return layer

    def from_spec(self, model: nn.Module, layers: dict[str, dict]) -> None:
        super().from_spec(model, layers)
        for layer in map(model.get_submodule, layers):
            if self.fade_bias and layer.bias is not None and isinstance(layer, DeltaLinear):
                layer.register_buffer("faded_bias", layer.bias.detach().clone())

    def distillation_parameters(self, model: nn.Module) -> set[str]:
        fading = {id(layer.base) for layer in last_layers(model).values()}
        return {name for name in super().distillation_parameters(model) if id(model.get_parameter(name)) not in fading}

    def on_distillation_step(self, model: nn.Module, share: float) -> bool:
        factor = SCHEDULES[self.schedule](share / self.decay) if share < self.decay else 0.0
        for layer in last_layers(model).values():
            if self.fade_bias and layer.bias is not None:
                layer.bias.data += (factor - layer.keep_base) * layer.faded_bias
            layer.keep_base.fill_(factor)
        return factor == 0

    def on_distillation_end(self, model: nn.Module, alone: bool) -> None:
        layers = last_layers(model)
        if not any(layer.left.any() for layer in layers.values()):
            raise UsageError("PcLora: without distillation nothing takes the pretrained weights' place: distil first")
        for name, layer in layers.items():
            trains = {p: p.requires_grad for p in layer.parameters()}
            factored = FactoredLinear(layer.left, layer.right, bias=layer.bias)
            for p in factored.parameters():
                p.requires_grad_(trains[p])
            model.set_submodule(name, factored.train(layer.training))
