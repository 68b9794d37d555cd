"""WeCoLoRA: copy every other block, then distil into low-rank updates (arXiv 2404.09326).

The student is blocks 0, r, 2 r, ... of the teacher, with r = `keep_every`. The weight of each of their linear layers
becomes W + left right, where left (m, k) starts at 0 and right (k, n) Kaiming uniform. left and right alone train, in
distillation and, where no other method is applied next, in adaptation. Each remaining layer stores m n + k (m + n)
weights. Before another method adapts the model, left right is added into W.

Paper: distilled by the mean absolute error of the last block's output. Here: by CRISP's loss, like every compressor;
the paper's is `stage.distil.kl=0 stage.distil.mse=0 stage.distil.features=0 stage.distil.l1=1`.
Paper's code: ten epochs of AdamW, 1e-3 a 256 pictures, decay 0.05, betas .9 and .95. Here: keys of stage.distil.
Paper: rank 128 on every linear layer of a ViT. Here: the rank is at most the layer's narrower side. Where a model has
stages (Swin), every stage counts its own blocks, so that each keeps its first.
"""

from dataclasses import dataclass

from torch import nn

from recombine.core.method import Site, need
from recombine.errors import UsageError
from recombine.methods.low_rank import last_layers, low_rank
from recombine.methods.pruning.base import Structural, comes_first
from recombine.models import roles


@dataclass(kw_only=True)
class WeCoLora(Structural):
    """Keeps some of the blocks and trains low-rank updates of their layers (arXiv 2404.09326).

    Args:
        keep_every: one of every so many blocks is copied. It alone sets the size, so no budget can.
        rank: of the updates; at most the narrower side of a layer.
    """

    keep_every: int = 2
    rank: int = 128

    def check(self, sites: list[Site]) -> None:
        need(self.keep_every >= 1, self, "keep_every", "one block of at least one is copied")
        need(self.rank >= 1, self, "rank", "must be at least 1")

    def before_budget(self, model: nn.Module, sites: list[Site], losses) -> None:
        comes_first(self, model)
        names = roles.block_names(model)
        self.blocks = [i for i, name in enumerate(names) if int(name.rpartition(".")[2]) % self.keep_every == 0]
        if len(self.blocks) == len(names) and self.keep_every > 1:
            why = "every block of this model is the first of its container, so none would be left out"
            raise UsageError(f"{self.key}.keep_every={self.keep_every}: {why}; choose another compressor")
        stay = tuple(f"{names[i]}." for i in self.blocks)
        self.left = [site.module.weight.shape for site in sites if site.name.startswith(stay)]

    def sizes(self, sites: list[Site]) -> tuple[int, int]:
        trained = sum(min(self.rank, m, n) * (m + n) for m, n in self.left)
        return sum(m * n for m, n in self.left) + trained, trained

    def prune(self, model: nn.Module, sites: list[Site]) -> None:
        for name in roles.find(model, self.targets, self.target_types):  # the blocks have moved up
            model.set_submodule(name, low_rank(model.get_submodule(name), self.rank))

    def distillation_parameters(self, model: nn.Module) -> set[str]:
        deltas = {id(p) for layer in last_layers(model).values() for p in (layer.left, layer.right)}
        return {name for name, p in model.named_parameters() if id(p) in deltas}

    def on_distillation_end(self, model: nn.Module, alone: bool) -> None:
        if not alone:
            for name, layer in last_layers(model).items():
                model.set_submodule(name, layer.merged().requires_grad_(False).train(layer.training))
