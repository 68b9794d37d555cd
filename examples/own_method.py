"""A method of your own: a dataclass with one function that returns the replacement of a layer.

    python examples/own_method.py        ten seconds on an idle CPU, no downloads

This one factors every weight by a randomised SVD (Halko et al. 2011, arXiv 0909.4061) and trains the left factor.
Counting, saving, loading and merging come with the layer. docs/extending.md says how to use it on the command line.
"""

from dataclasses import dataclass

import digits
import torch
from torch import nn

import recombine
from recombine import Method, Site, UsageError
from recombine.layers import FactoredLinear


@dataclass(kw_only=True)
class RandomisedSvd(Method):
    """W (m, n) ~ left (m, rank) right (rank, n). Trains left."""

    rank: int = 16
    oversampling: int = 8

    def check(self, sites: list[Site]) -> None:
        if not 1 <= self.rank <= min(min(site.module.weight.shape) for site in sites):
            raise UsageError(f"method.rank={self.rank}: must lie between 1 and the narrowest side of a layer")

    def recombine(self, site: Site) -> nn.Module:
        weight = site.module.weight.detach()
        u, s, v = torch.svd_lowrank(weight, min(self.rank + self.oversampling, *weight.shape))
        left, right = u[:, : self.rank] * s[: self.rank], v[:, : self.rank].T
        layer = FactoredLinear(left, right, bias=site.module.bias)
        layer.left.requires_grad_(True)
        return layer


def main(pretrain: int = 300, adapt: int = 200) -> dict[str, float]:
    """Prints and returns the test accuracies; pretrain and adapt are numbers of training steps."""
    training, test = digits.load()
    model = digits.vit()
    digits.train(model, training, pretrain)  # stands in for downloading a pretrained model
    found = {"pretrained": digits.accuracy(model, test)}

    recombine.apply(model, RandomisedSvd(rank=4, targets=("qkv", "o", "up", "down")))
    found["rewritten"] = digits.accuracy(model, test)
    digits.train(model, training, adapt)
    found["trained"] = digits.accuracy(model, test)
    print(f"retained {100 * recombine.count(model).retained:.1f} % of the layers")

    recombine.merge(model)
    found["merged"] = digits.accuracy(model, test)
    for name, accuracy in found.items():
        print(f"{name:12} {100 * accuracy:.1f} %")
    return found


if __name__ == "__main__":
    main()
