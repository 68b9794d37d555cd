"""The adapters of the `peft` library as one method.

They are LoRA (arXiv 2106.09685), DoRA (2402.09353), PiSSA (2404.02948), BOFT (2311.06243), IA3 (2205.05638),
RoAD (2409.00119), VB-LoRA (2405.15179), HiRA (ICLR 2025) and peft's other adapters of linear layers. Each is a YAML:
`config` names a peft class, `options` are its arguments.

A layer stores its base weight (PiSSA: less the part that its adapter takes over) and the adapter. What peft marks
trains.
"""

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from recombine.core.account import held
from recombine.core.method import Method, Site
from recombine.errors import UsageError
from recombine.layers import RecombinedLinear
from recombine.methods.adapters.call_watch import watch_calls
from recombine.methods.adapters.peft_checks import (
    adapter_config,
    check_config,
    check_options,
    narrowest,
    one_line,
    output,
    warn_if_moved,
)
from recombine.methods.ranks import rank_notes, widths
from recombine.models import roles

FACTORED = ("pissa", "olora")  # values of init_lora_weights that factor the weight and take a part of it away


@dataclass(kw_only=True)
class Peft(Method):
    """Puts an adapter of the peft library on every target layer.

    Args:
        config: name of a peft configuration class, such as LoraConfig or BOFTConfig.
        rank: the adapter's rank, peft's `r`; None for a class that has none.
        options: other arguments of that class, such as {"lora_alpha": 16}; not `target_modules`, which `targets` sets.
            `feedforward_modules` takes roles (IA3: ["down"]).
    """

    config: str = "LoraConfig"
    rank: int | None = 8
    options: dict[str, Any] = field(default_factory=dict)

    budget_fields: ClassVar[dict[str, str]] = {"trainable": "rank", "memory": "rank"}

    @property
    def target_types(self) -> tuple[type, ...]:
        """LoRA and DoRA adapt compressed layers too; the others need a dense weight."""
        return (nn.Linear, RecombinedLinear) if self.config == "LoraConfig" else (nn.Linear,)

    def check(self, sites: list[Site]) -> None:
        check_config(self.config, self.rank, self.options, sites)
        check_options(self.options, self.targets, sites)
        self.ghosts(sites)

    def notes(self, sites: list[Site]) -> list[str]:
        return rank_notes(self, widths(sites))

    def budget_values(self, field: str, sites: list[Site]) -> Sequence[int]:
        if self.rank is None:
            raise UsageError(f"method.rank=null: {self.config} has no rank that a budget could set; use budget=none")
        return range(1, 1 + narrowest(sites))

    def sizes(self, sites: list[Site]) -> tuple[int, int]:
        """(stored, trained) weights, counted on what peft builds for layers without memory."""
        ghosts = self.ghosts(sites)
        trained = sum(p.numel() for p in ghosts.parameters() if p.requires_grad)
        plain = sum(site.module.in_features * site.module.out_features for site in sites)
        return held(site.module for site in sites) + held([ghosts]) - plain, trained

    def ghosts(self, sites: list[Site]) -> nn.ModuleDict:
        """The adapted layers on torch's meta device, without memory, run once.

        Raises:
            UsageError: peft refuses the options.
        """
        ghosts, roles_by_name = nn.ModuleDict(), {}
        for i, site in enumerate(sites):
            n, m, bias = site.module.in_features, site.module.out_features, site.module.bias is not None
            ghosts[f"layer{i}"], roles_by_name[f"layer{i}"] = nn.Linear(n, m, bias, device="meta"), site.role
        with torch.random.fork_rng(devices=[]):
            self.inject(ghosts, roles_by_name, fresh=False, low_cpu_mem_usage=True)
        with one_line(self.config, self.options):
            for ghost in ghosts.eval().values():
                ghost(torch.empty(1, ghost.in_features, device="meta"))
        return ghosts

    def inject(self, model: nn.Module, layers: dict[str, str], fresh: bool = True, **how) -> None:
        """Puts adapters on layers of the model, in place.

        Args:
            layers: role of each, by module name.
            fresh: the adapters keep their initial values; otherwise these are overwritten or only counted, so no
                weight is factorised for them.
            how: further arguments of peft's tuner.

        Raises:
            UsageError: peft refuses the options.
        """
        import peft

        options = dict(self.options) if self.rank is None else {**self.options, "r": self.rank}
        if self.rank is not None:
            wide = widths([Site(name, role, model.get_submodule(name)) for name, role in layers.items()])
            narrow = {re.escape(name): width for name, width in wide.items() if width < self.rank}
            if narrow:  # `check_config` has seen that the class has ranks by layer
                options["rank_pattern"] = narrow | dict(options.get("rank_pattern") or {})
        if "feedforward_modules" in options:
            feedforward = options["feedforward_modules"] or ()
            options["feedforward_modules"] = [name for name, role in layers.items() if role in feedforward]
        if not fresh and str(options.get("init_lora_weights")).startswith(FACTORED):
            options["init_lora_weights"] = True
        config_class = adapter_config(self.config, options)
        with one_line(self.config, self.options), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of layer types and extensions that `check` has looked at
            config = config_class(target_modules=list(layers), **options)
            if self.config == "LoraConfig":
                config._register_custom_module({RecombinedLinear: peft.tuners.lora.Linear})
            peft.PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type](model, config, "default", **how)

    @torch.no_grad()
    def rewrite(self, model: nn.Module, sites: list[Site], losses=None) -> None:
        before = {site.name: output(site.module) for site in sites}
        self.inject(model, {site.name: site.role for site in sites})
        after = {name: output(model.get_submodule(name).eval()) for name in before}  # `apply` sets the model's mode
        warn_if_moved(self.config, before, after)
        watch_calls(model, before)

    def to_spec(self, model: nn.Module, names: list[str]) -> dict[str, dict]:
        roles_by_name = roles.find(model, self.targets, nn.Module)
        return {name: {"role": roles_by_name[name]} for name in names}

    def from_spec(self, model: nn.Module, layers: dict[str, dict]) -> None:
        with torch.random.fork_rng(devices=[]):
            self.inject(model, {name: spec["role"] for name, spec in layers.items()}, fresh=False)
