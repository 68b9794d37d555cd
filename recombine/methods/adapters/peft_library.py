"""The adapters of the `peft` library as one method.

They are LoRA (arXiv 2106.09685), DoRA (2402.09353), PiSSA (2404.02948), BOFT (2311.06243), IA3 (2205.05638),
RoAD (2409.00119), VB-LoRA (2405.15179), HiRA (ICLR 2025) and peft's other adapters of linear layers. Each is a YAML:
`config` names a peft class, `options` are its arguments. LoRA's starts from data, EVA and CorDA, are our own
(`peft_starts`).

A layer stores its base weight (PiSSA, CorDA: less the part that its adapter takes over) and the adapter. What peft
marks trains. Fixed bases and indices (VeRA, RandLoRA, TinyLoRA, PSOFT, UniLoRA) are buffers: a checkpoint holds them,
and no count of weights has them.
"""

import re
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from recombine.core.account import held
from recombine.core.method import Method, Site
from recombine.errors import UsageError
from recombine.layers import RecombinedLinear
from recombine.methods.adapters.call_watch import watch_calls
from recombine.methods.adapters.peft_checks import (
    adapter_config,
    check_blocks,
    check_config,
    check_options,
    one_line,
    output,
    warn_if_moved,
)
from recombine.methods.adapters.peft_ranks import NO_VALUES, SHARING, SIZES, cpu_mask, possible_ranks, possible_sizes
from recombine.methods.adapters.peft_starts import (
    check_start,
    digest,
    redistributed,
    set_start,
    settings_of,
    start_of,
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

    @property
    def budget_fields(self) -> dict[str, str]:
        """The rank, or what sets the size of a class whose rank does not."""
        field = f"options.{SIZES[self.config]}" if self.config in SIZES else "rank"
        return {"trainable": field, "memory": field}

    @property
    def target_types(self) -> tuple[type, ...]:
        """LoRA and DoRA adapt compressed layers too; the others need a dense weight."""
        return (nn.Linear, RecombinedLinear) if self.config == "LoraConfig" else (nn.Linear,)

    def check(self, sites: list[Site]) -> None:
        check_config(self.config, self.rank, self.options, sites)
        check_start(self.options)
        check_options(self.options, self.targets, sites)
        if self.config == "OFTConfig":
            check_blocks(self.rank, self.options, sites)
        self.ghosts(sites)

    def statistics_needed(self) -> set[str]:
        return {"inputs"} if start_of(self.options) else set()

    def digest(self, group: list[Site]) -> dict[str, Tensor]:
        return digest(start_of(self.options), group[0], self.stats[group[0].name].inputs.xx)

    def notes(self, sites: list[Site]) -> list[str]:
        return rank_notes(self, widths(sites))

    def budget_values(self, field: str, sites: list[Site]) -> Sequence[int]:
        if field != "rank":
            return possible_sizes(self.config, self.rank, sites)
        if self.rank is None:
            raise UsageError(f"method.rank=null: {self.config} has no rank that a budget could set; use budget=none")
        return possible_ranks(self.config, self.options, sites)

    def sizes(self, sites: list[Site]) -> tuple[int, int]:
        """(stored, trained) weights, counted on what peft builds for layers without memory."""
        ghosts, alike = self.ghosts(sites)
        found = {  # by identity: what layers share is counted once
            id(p): (key, p.numel() * alike[name], p.requires_grad)
            for name, ghost in ghosts.items()
            for key, p in ghost.named_parameters()
        }
        stored = sum(count for key, count, _ in found.values() if not key.endswith("bias"))
        plain = sum(site.module.in_features * site.module.out_features for site in sites)
        trained = sum(count for _, count, trains in found.values() if trains)
        return held(site.module for site in sites) + stored - plain, trained

    def ranks(self, sites: list[Site]) -> dict[str, int]:
        """The rank of every layer, by its name; empty for a class that has none."""
        if self.rank is None:
            return {}
        most = widths(sites)
        if start_of(self.options) == "eva" and all(site.name in self.kept for site in sites):
            shares = {site.name: self.digested([site])["shares"] for site in sites}
            if not any(share.is_meta for share in shares.values()):  # a plan knows none
                return redistributed(self.rank, settings_of(self.options)["rho"], most, shares)
        return {name: min(self.rank, width) for name, width in most.items()}

    def ghosts(self, sites: list[Site]) -> tuple[nn.ModuleDict, dict[str, int]]:
        """Adapted layers on torch's meta device, without memory, run once; and how many layers each stands for.

        Raises:
            UsageError: peft refuses the options.
        """
        ghosts, layers, ranks = nn.ModuleDict(), {}, self.ranks(sites)
        names, alike = {}, Counter()
        for i, site in enumerate(sites):
            n, m, bias = site.module.in_features, site.module.out_features, site.module.bias is not None
            rank = ranks.get(site.name)
            kind = i if self.config in SHARING else (n, m, bias, site.role, rank)
            name = names.setdefault(kind, f"layer{len(names)}")
            alike[name] += 1
            if name not in layers:
                ghosts[name], layers[name] = nn.Linear(n, m, bias, device="meta"), {"role": site.role, "rank": rank}
        with torch.random.fork_rng(devices=[]):
            self.inject(ghosts, layers, fresh=False, low_cpu_mem_usage=True)
        if self.config not in NO_VALUES:
            with one_line(self.config, self.options):
                for ghost in ghosts.eval().values():
                    ghost(torch.empty(1, ghost.in_features, device="meta"))
        return ghosts, alike

    def inject(self, model: nn.Module, layers: dict[str, dict], fresh: bool = True, **how) -> None:
        """Puts adapters on layers of the model, in place.

        Args:
            layers: role of each and its rank, by module name.
            fresh: the adapters keep their initial values; otherwise these are overwritten or only counted, so no
                weight is factorised for them.
            how: further arguments of peft's tuner.

        Raises:
            UsageError: peft refuses the options.
        """
        import peft

        options = self.options_for(layers)
        if not fresh and str(options.get("init_lora_weights")).startswith(FACTORED):
            options["init_lora_weights"] = True
        config_class = adapter_config(self.config, options)
        with one_line(self.config, self.options), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of layer types and extensions that `check` has looked at
            config = config_class(target_modules=list(layers), **options)
            if self.config == "LoraConfig":
                config._register_custom_module({RecombinedLinear: peft.tuners.lora.Linear})
            if self.config == "ShiraConfig":
                config.mask_fn = cpu_mask
            peft.PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type](model, config, "default", **how)
        keep_buffers(model)

    def options_for(self, layers: dict[str, dict]) -> dict[str, Any]:
        """peft's options for these layers. layers: as in `inject`."""
        options = dict(self.options) if self.rank is None else {**self.options, "r": self.rank}
        other = {
            re.escape(name): entry["rank"] for name, entry in layers.items() if entry["rank"] not in (None, self.rank)
        }
        if other:  # `check_config` has seen that the class has ranks by layer
            options["rank_pattern"] = other | dict(options.get("rank_pattern") or {})
        if start := start_of(options):  # its values come from us
            options = {key: value for key, value in options.items() if key != f"{start}_config"}
            options["init_lora_weights"] = True
        if start == "eva":  # alpha over rank is the same for all
            share = options.get("lora_alpha", 8) / self.rank
            options["alpha_pattern"] = {name: share * rank for name, rank in other.items()}
        if "feedforward_modules" in options:
            feedforward = options["feedforward_modules"] or ()
            options["feedforward_modules"] = [name for name, entry in layers.items() if entry["role"] in feedforward]
        return options

    @torch.no_grad()
    def rewrite(self, model: nn.Module, sites: list[Site], losses=None) -> None:
        before = {site.name: output(site.module) for site in sites}
        ranks = self.ranks(sites)
        self.inject(model, {site.name: {"role": site.role, "rank": ranks.get(site.name)} for site in sites})
        if start := start_of(self.options):
            for site in sites:
                part = settings_of(self.options).get("corda_method")
                set_start(start, model.get_submodule(site.name), self.digested([site]), part)
        after = {name: output(model.get_submodule(name).eval()) for name in before}  # `apply` sets the model's mode
        warn_if_moved(self.config, before, after)
        watch_calls(model, before)

    def to_spec(self, model: nn.Module, names: list[str]) -> dict[str, dict]:
        roles_by_name, eva = roles.find(model, self.targets, nn.Module), start_of(self.options) == "eva"
        return {
            name: {"role": roles_by_name[name]} | ({"rank": model.get_submodule(name).r["default"]} if eva else {})
            for name in names
        }

    def from_spec(self, model: nn.Module, layers: dict[str, dict]) -> None:
        ranks = self.ranks([Site(name, spec["role"], model.get_submodule(name)) for name, spec in layers.items()])
        with torch.random.fork_rng(devices=[]):
            self.inject(
                model,
                {
                    name: {"role": spec["role"], "rank": spec.get("rank", ranks.get(name))}
                    for name, spec in layers.items()
                },
                fresh=False,
            )


def keep_buffers(model: nn.Module) -> None:
    """Has a state dict hold every fixed tensor of peft's adapters: what a seed or an SVD gives may differ elsewhere."""
    from peft.tuners._buffer_dict import BufferDict

    for module in model.modules():
        if isinstance(module, BufferDict):
            module.persistent = True
            module._non_persistent_buffers_set.clear()
