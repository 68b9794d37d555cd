"""The two ends of every table: training the head alone, and training everything."""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from recombine.core.method import Method, Site
from recombine.errors import UsageError
from recombine.models import roles


@dataclass(kw_only=True)
class LinearProbe(Method):
    """Trains the classification head alone. `targets` only names the layers that the counts are relative to."""

    target_types: ClassVar[tuple[type, ...]] = (nn.Module,)

    def sizes(self, sites: list[Site]) -> tuple[int, int]:
        return sum(site.module.weight.numel() for site in sites), 0

    def to_spec(self, model: nn.Module, names: list[str]) -> dict[str, dict]:
        return {}  # it replaces no layer

    def rewrite(self, model: nn.Module, sites: list[Site], losses=None) -> None:
        if roles.head(model) is None:
            raise UsageError(f"{type(self).__name__}: {type(model).__name__} has no classification head to train")


@dataclass(kw_only=True)
class Full(LinearProbe):
    """Trains every parameter: full fine-tuning."""

    def sizes(self, sites: list[Site]) -> tuple[int, int]:
        dense = sum(site.module.weight.numel() for site in sites)
        return dense, dense

    def check(self, sites: list[Site]) -> None:
        super().check(sites)
        for site in sites:
            if not all(p.is_floating_point() for p in site.module.parameters()):
                raise UsageError(f"{site.name} holds packed integers, which cannot train; say method=lora")

    def rewrite(self, model: nn.Module, sites: list[Site], losses=None) -> None:
        model.requires_grad_(True)
