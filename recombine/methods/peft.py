"""The `peft` library as a method: LoRA (arXiv 2106.09685), DoRA (2402.09353), PiSSA (2404.02948), BOFT (2311.06243),
IA3 (2205.05638), RoAD (2409.00119), VB-LoRA (2405.15179), HiRA (ICLR 2025) and its other adapters of linear layers.

A peft method is a YAML: `config` names a peft class, `options` are its arguments. Stored: the layer as it was (PiSSA:
less what its adapter took over) and the adapter. Trains: what peft marks.
"""

import logging
import warnings
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from recombine.budget import held
from recombine.errors import UsageError
from recombine.layers import RecombinedLinear
from recombine.methods.base import Method, Site, need
from recombine.models import roles

log = logging.getLogger(__name__)

FACTORED = ("pissa", "olora")  # values of init_lora_weights that factor the weight and take a part of it away
NOT_IDENTITY = 1e-4  # relative change of a layer's output that rounding does not explain


@dataclass(kw_only=True)
class Peft(Method):
    """Args:
    config: name of a peft configuration class, such as LoraConfig.
    rank: the adapter's rank (peft's `r`), for those that have one.
    options: every other argument of that class, except `target_modules`. `feedforward_modules` takes roles.
    """

    config: str = "LoraConfig"
    rank: int | None = 8
    options: dict[str, Any] = field(default_factory=dict)

    knobs: ClassVar[dict[str, str]] = {"trainable": "rank", "memory": "rank"}

    @property
    def on(self) -> tuple[type, ...]:
        """LoRA and DoRA add to whatever a layer computes; the others rewrite its weight."""
        return (nn.Linear, RecombinedLinear) if self.config == "LoraConfig" else (nn.Linear,)

    def check(self, sites: list[Site]) -> None:
        import peft

        kinds = [k for k in dir(peft) if k.endswith("Config") and issubclass(getattr(peft, k), peft.PeftConfig)]
        near = get_close_matches(self.config, kinds, 3) or ["LoraConfig"]
        need(self.config in kinds, self, "config", f"peft has no such class; near: {', '.join(near)}")
        known = {f.name for f in fields(getattr(peft, self.config))}
        need("target_modules" in known, self, "config", "adapts no linear layers; choose one that does: LoraConfig")
        for key in self.options:
            if key not in known or key in ("r", "target_modules"):
                near = get_close_matches(key, known - {"r", "target_modules"}, 3) or sorted(known)
                raise UsageError(f"method.options.{key}: {self.config} takes no such option; near: {', '.join(near)}")
        if self.rank is not None:
            need("r" in known, self, "rank", f"{self.config} has no rank; set method.rank=null")
            most = narrowest(sites)
            need(1 <= self.rank <= most, self, "rank", f"must be from 1 to {most}, the narrowest target layer")
        targets = [target.removesuffix("?") for target in self.targets]
        for role in self.options.get("feedforward_modules") or ():
            if role not in targets:
                raise UsageError(f"method.options.feedforward_modules: {role!r} is not in targets {' '.join(targets)}")
        if self.options.get("boft_n_butterfly_factor", 1) != 1 and not butterflies():
            factor = self.options["boft_n_butterfly_factor"]
            why = "peft's CUDA extension for it cannot be built here and peft would use one factor: set it to 1"
            raise UsageError(f"method.options.boft_n_butterfly_factor={factor}: {why}")
        init = self.options.get("init_lora_weights", True)
        for site in sites:
            if isinstance(site.linear, RecombinedLinear) and isinstance(init, str) and init != "gaussian":
                why = f"{site.name} is a {type(site.linear).__name__}, which holds no weight to take a part of"
                raise UsageError(f"method.options.init_lora_weights={init}: {why}; set it to true")
        self.ghosts(sites)

    def choices(self, knob: str, sites: list[Site]) -> Sequence[int]:
        if self.rank is None:
            raise UsageError(f"method.rank=null: {self.config} has no rank that a budget could set; use budget=none")
        return range(1, 1 + narrowest(sites))

    def sizes(self, sites: list[Site]) -> tuple[int, int]:
        """Counted on layers without memory, so it is right for whatever peft builds."""
        ghosts = self.ghosts(sites)
        trained = sum(p.numel() for p in ghosts.parameters() if p.requires_grad)
        plain = sum(site.linear.in_features * site.linear.out_features for site in sites)
        return held(site.linear for site in sites) + held([ghosts]) - plain, trained

    def ghosts(self, sites: list[Site]) -> nn.ModuleDict:
        """The adapted layers without memory, run once: what peft refuses, it refuses here."""
        ghosts, played = nn.ModuleDict(), {}
        for i, site in enumerate(sites):
            n, m, bias = site.linear.in_features, site.linear.out_features, site.linear.bias is not None
            ghosts[f"layer{i}"], played[f"layer{i}"] = nn.Linear(n, m, bias, device="meta"), site.role
        with torch.random.fork_rng(devices=[]):
            self.inject(ghosts, played, fresh=False, low_cpu_mem_usage=True)
        with one_line(self):
            for ghost in ghosts.eval().values():
                ghost(torch.empty(1, ghost.in_features, device="meta"))
        return ghosts

    def inject(self, model: nn.Module, layers: dict[str, str], fresh: bool = True, **how) -> None:
        """Puts adapters on the layers {name: role}, in place. Not fresh: their tensors are filled or only counted."""
        import peft

        options = dict(self.options) if self.rank is None else {**self.options, "r": self.rank}
        if "feedforward_modules" in options:
            played = options["feedforward_modules"] or ()
            options["feedforward_modules"] = [name for name, role in layers.items() if role in played]
        if not fresh and str(options.get("init_lora_weights")).startswith(FACTORED):
            options["init_lora_weights"] = True
        with one_line(self), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of layer types and extensions that `check` has looked at
            config = getattr(peft, self.config)(target_modules=list(layers), **options)
            if self.config == "LoraConfig":
                config._register_custom_module({RecombinedLinear: peft.tuners.lora.Linear})
            peft.PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type](model, config, "default", **how)

    @torch.no_grad()
    def rewrite(self, model: nn.Module, sites: list[Site], losses=None) -> None:
        before = {site.name: output(site.linear) for site in sites}
        self.inject(model, {site.name: site.role for site in sites})
        changes = {}
        for name, y in before.items():
            new = output(model.get_submodule(name).eval())  # `apply` sets the mode that the model is in
            changes[name] = ((new - y).norm() / y.norm().clamp(min=1e-30)).item()
        worst = max(changes, key=changes.get)
        if not changes[worst] <= NOT_IDENTITY:
            text = "%s is not the identity at the start: it changes the output of %s, the most, by %.2g of its norm"
            log.warning(text, self.config, worst, changes[worst])

    def describe(self, model: nn.Module, names: list[str]) -> dict[str, dict]:
        played = roles.find(model, self.targets, nn.Module)
        return {name: {"role": played[name]} for name in names}

    def restore(self, model: nn.Module, layers: dict[str, dict]) -> None:
        with torch.random.fork_rng(devices=[]):
            self.inject(model, {name: spec["role"] for name, spec in layers.items()}, fresh=False)


@contextmanager
def one_line(method: Peft):
    """What peft refuses becomes one line for the user."""
    try:
        yield
    except Exception as error:  # peft raises nearly every kind
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UsageError(f"method.options={method.options}: {method.config}: {reason}; change that option") from error


def narrowest(sites: list[Site]) -> int:
    """The largest rank that every target layer can have; no compressed layer is built for it."""
    return min(min(site.linear.in_features, site.linear.out_features) for site in sites)


def butterflies() -> bool:
    """Whether peft finds or builds the CUDA extension that BOFT needs for more than one butterfly factor."""
    from peft.tuners.boft.layer import get_fbd_cuda

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return bool(get_fbd_cuda())


def output(layer: nn.Module) -> Tensor:
    """(8, out): of a layer on the same Gaussian inputs every time."""
    x = torch.randn(8, layer.in_features, generator=torch.Generator().manual_seed(0))
    return layer(x.to(next(layer.parameters())))
