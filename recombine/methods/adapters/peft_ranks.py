"""The ranks that a peft class can have, and what it draws by values that a layer without memory lacks."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from recombine.core.method import Site
from recombine.methods.ranks import widths

NO_VALUES = ("ShiraConfig", "WaveFTConfig")  # their forward looks at values, which layers without memory lack

SHARING = ("TinyLoraConfig", "UniLoraConfig", "VBLoRAConfig", "WaveFTConfig")  # a layer's count depends on the others
SIZES = {  # classes whose rank does not say how many weights train -> the option that does
    "FourierFTConfig": "n_frequency",
    "TinyLoraConfig": "u",
    "UniLoraConfig": "theta_d_length",
    "WaveFTConfig": "n_frequency",
}


def possible_ranks(config: str, options: dict[str, Any], sites: list[Site]) -> Sequence[int]:
    """The ranks that a budget may set, from the fewest trained weights to the most.

    RandLoRA trains ceil(N / r) (r + N) weights a layer, N its narrower side, so the largest rank trains the least; of
    the ranks with as many bases the smallest stands for all. GraLoRA's rank is a multiple of its blocks, HRA starts at
    the model only with pairs of reflections, and SHiRA has no more weights than the layer.
    """
    narrowest = min(widths(sites).values())
    if config == "RandLoraConfig":
        return list(dict.fromkeys(-(-narrowest // bases) for bases in range(1, narrowest + 1)))
    if config == "ShiraConfig":
        shapes = [(site.module.out_features, site.module.in_features) for site in sites]
        return range(1, 1 + max(1, min(m * n // (m + n) for m, n in shapes)))
    step = {"GraloraConfig": options.get("gralora_k", 2), "HRAConfig": 2}.get(config, 1)
    return range(step, 1 + max(step, narrowest), step)


def possible_sizes(config: str, rank: int, sites: list[Site]) -> Sequence[int]:
    """The values of a class's option in SIZES that a budget may set: up to as many as can be told apart."""
    shapes = [(site.module.out_features, site.module.in_features) for site in sites]
    most = {
        "TinyLoraConfig": lambda: rank * rank,
        "UniLoraConfig": lambda: sum(rank * (m + n) for m, n in shapes),
    }.get(config, lambda: min(m * n for m, n in shapes))
    return range(1, 1 + most())


def cpu_mask(layer: nn.Module, r: int, random_seed: int | None = None, **_) -> Tensor:
    """SHiRA's mask (m, n) of r (m + n) entries that train, drawn on the CPU, so that a layer without memory has one."""
    m, n = layer.out_features, layer.in_features
    generator = torch.Generator().manual_seed(0 if random_seed is None else random_seed)
    mask = torch.zeros(m * n, dtype=torch.bool)
    mask[torch.randperm(m * n, generator=generator)[: r * (m + n)]] = True
    return mask.view(m, n)
