"""The `peft` library as a method: LoRA (arXiv 2106.09685), DoRA (arXiv 2402.09353) and its other adapters.

A peft method is a YAML: `config` names a peft class, `options` are its arguments. Trains: what peft marks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any, ClassVar

import torch
from torch import nn

from recombine.errors import UsageError
from recombine.methods.base import Method, Site, need


@dataclass(kw_only=True)
class Peft(Method):
    """Args:
    config: name of a peft configuration class, such as LoraConfig.
    rank: the adapter's rank (peft's `r`), for those that have one.
    options: every other argument of that class, except `target_modules`.
    """

    config: str = "LoraConfig"
    rank: int | None = 8
    options: dict[str, Any] = field(default_factory=dict)

    knobs: ClassVar[dict[str, str]] = {"trainable": "rank", "memory": "rank"}

    def check(self, sites: list[Site]) -> None:
        import peft

        kinds = [k for k in dir(peft) if k.endswith("Config") and issubclass(getattr(peft, k), peft.PeftConfig)]
        near = get_close_matches(self.config, kinds, 3) or ["LoraConfig"]
        need(self.config in kinds, self, "config", f"peft has no such class; near: {', '.join(near)}")
        known = {f.name for f in fields(getattr(peft, self.config))}
        for key in self.options:
            if key not in known or key in ("r", "target_modules"):
                near = get_close_matches(key, known - {"r", "target_modules"}, 3) or sorted(known)
                raise UsageError(f"method.options.{key}: {self.config} takes no such option; near: {', '.join(near)}")
        if self.rank is not None:
            need("r" in known, self, "rank", f"{self.config} has no rank; set method.rank=null")
            most = min(min(site.linear.weight.shape) for site in sites)
            need(1 <= self.rank <= most, self, "rank", f"must be from 1 to {most}, the narrowest target layer")

    def choices(self, knob: str, sites: list[Site]) -> Sequence[int]:
        if self.rank is None:
            raise UsageError(f"method.rank=null: {self.config} has no rank that a budget could set; use budget=none")
        return range(1, 1 + min(min(site.linear.weight.shape) for site in sites))

    def sizes(self, sites: list[Site]) -> tuple[int, int]:
        """Counted on layers without memory, so it is right for whatever peft builds."""
        shapes = [(site.linear.in_features, site.linear.out_features) for site in sites]
        ghost = nn.ModuleDict({f"layer{i}": nn.Linear(*shape, device="meta") for i, shape in enumerate(shapes)})
        self.inject(ghost, list(ghost), low_cpu_mem_usage=True)
        trained = sum(p.numel() for p in ghost.parameters() if p.requires_grad)
        stored = sum(p.numel() for name, p in ghost.named_parameters() if not name.endswith("bias"))
        return stored, trained

    def inject(self, model: nn.Module, names: list[str], **how) -> None:
        import peft

        rank = {} if self.rank is None else {"r": self.rank}
        config = getattr(peft, self.config)(target_modules=names, **rank, **self.options)
        peft.inject_adapter_in_model(config, model, **how)

    def rewrite(self, model: nn.Module, sites: list[Site], losses=None) -> None:
        self.inject(model, [site.name for site in sites])

    def describe(self, model: nn.Module, names: list[str]) -> dict[str, dict]:
        return {name: {} for name in names}

    def restore(self, model: nn.Module, layers: dict[str, dict]) -> None:
        with torch.random.fork_rng(devices=[]):
            self.inject(model, list(layers))
