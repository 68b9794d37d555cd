"""SSF: scaling and shifting your features (arXiv 2210.08823).

y = gamma * Op(x) + beta after every linear layer, every norm and the patch embedding. gamma and beta (C,) of each layer
alone train: 2 C weights for a layer with C outputs, 102,912 for ViT-S. They are stored beside the model and merge into
weight and bias.

Paper: gamma starts at N(1, 0.02^2) and beta at N(0, 0.02^2) (`start=normal`). Here: at 1 and 0, so the model starts as
it was.
Paper: vision models. Here: also language models, whose RMSNorms are scaled and not shifted, since they have no bias.
A linear layer without a bias (Llama's, Swin's reduction) has one after merging.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from recombine.core.account import held
from recombine.core.method import Method, Site, need
from recombine.errors import UsageError
from recombine.layers import ScaleShift


@dataclass(kw_only=True)
class Ssf(Method):
    """Scales and shifts the output of every target layer (arXiv 2210.08823).

    Args:
        targets: roles of linear layers; also norm, embed (the patch embedding) and reduction (between Swin's stages).
        start: identity leaves the model as it was; normal draws gamma and beta as the paper does.
        as_paper: fields that have their default take those of the paper, which `paper` names.
    """

    targets: tuple[str, ...] = ("qkv", "o", "up", "down", "gate?", "reduction?", "norm", "embed?")
    start: str = "identity"
    as_paper: bool = False

    paper: ClassVar[dict[str, Any]] = {"start": "normal"}
    target_types: ClassVar[tuple[type, ...]] = (nn.Module,)

    def check(self, sites: list[Site]) -> None:
        need(self.start in ("identity", "normal"), self, "start", "must be identity or normal")
        for site in sites:
            if hasattr(site.module, "base_layer"):
                kind = type(site.module).__name__
                raise UsageError(f"role {site.role!r}: {site.name} is already adapted ({kind}): merge it first")

    def sizes(self, sites: list[Site]) -> tuple[int, int]:
        trained = sum(len(site.module.weight) * (1 + hasattr(site.module, "bias")) for site in sites)
        return held(site.module for site in sites) + trained, trained

    def recombine(self, site: Site) -> ScaleShift:
        layer = ScaleShift(site.module)
        if self.start == "normal":
            nn.init.normal_(layer.gamma, 1, 0.02)
            if layer.beta is not None:
                nn.init.normal_(layer.beta, 0, 0.02)
        return layer

    def to_spec(self, model: nn.Module, names: list[str]) -> dict[str, dict]:
        return {name: {} for name in names}

    def from_spec(self, model: nn.Module, layers: dict[str, dict]) -> None:
        for name in layers:
            model.set_submodule(name, ScaleShift(model.get_submodule(name)))
