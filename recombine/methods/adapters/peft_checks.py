"""What stands between the user and peft: options it would take in silence, and errors it raises in many kinds."""

import logging
import warnings
from contextlib import contextmanager
from dataclasses import fields
from difflib import get_close_matches
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from recombine.core.method import Site, need
from recombine.errors import UsageError
from recombine.layers import RecombinedLinear

if TYPE_CHECKING:
    from recombine.methods.adapters.peft_library import Peft

log = logging.getLogger(__name__)

NOT_IDENTITY = 1e-4  # relative change of a layer's output that rounding does not explain


def check_options(method: "Peft", sites: list[Site]) -> None:
    """Raises UsageError for what peft's class does not know, or would not do as it is told."""
    import peft

    kinds = [k for k in dir(peft) if k.endswith("Config") and issubclass(getattr(peft, k), peft.PeftConfig)]
    near = get_close_matches(method.config, kinds, 3) or ["LoraConfig"]
    need(method.config in kinds, method, "config", f"peft has no such class; near: {', '.join(near)}")
    known = {f.name for f in fields(getattr(peft, method.config))}
    need("target_modules" in known, method, "config", "adapts no linear layers; choose one that does: LoraConfig")
    for key in method.options:
        if key not in known or key in ("r", "target_modules"):
            near = get_close_matches(key, known - {"r", "target_modules"}, 3) or sorted(known)
            raise UsageError(f"method.options.{key}: {method.config} takes no such option; near: {', '.join(near)}")
    if method.rank is not None:
        need("r" in known, method, "rank", f"{method.config} has no rank; set method.rank=null")
        most = narrowest(sites)
        need(1 <= method.rank <= most, method, "rank", f"must be from 1 to {most}, the narrowest target layer")
    targets = [target.removesuffix("?") for target in method.targets]
    for role in method.options.get("feedforward_modules") or ():
        if role not in targets:
            raise UsageError(f"method.options.feedforward_modules: {role!r} is not in targets {' '.join(targets)}")
    if method.options.get("boft_n_butterfly_factor", 1) != 1 and not butterflies():
        factor = method.options["boft_n_butterfly_factor"]
        why = "peft's CUDA extension for it cannot be built here and peft would use one factor: set it to 1"
        raise UsageError(f"method.options.boft_n_butterfly_factor={factor}: {why}")
    init = method.options.get("init_lora_weights", True)
    for site in sites:
        if isinstance(site.linear, RecombinedLinear) and isinstance(init, str) and init != "gaussian":
            why = f"{site.name} is a {type(site.linear).__name__}, which holds no weight to take a part of"
            raise UsageError(f"method.options.init_lora_weights={init}: {why}; set it to true")


@contextmanager
def one_line(method: "Peft"):
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


def warn_if_moved(config: str, before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    """Says so where the adapter is not the identity at the start. Outputs are by layer."""
    changes = {name: ((after[name] - y).norm() / y.norm().clamp(min=1e-30)).item() for name, y in before.items()}
    worst = max(changes, key=changes.get)
    if not changes[worst] <= NOT_IDENTITY:
        text = "%s is not the identity at the start: it changes the output of %s, the most, by %.2g of its norm"
        log.warning(text, config, worst, changes[worst])


def output(layer: nn.Module) -> Tensor:
    """(8, out): of a layer on the same Gaussian inputs every time."""
    x = torch.randn(8, layer.in_features, generator=torch.Generator().manual_seed(0))
    return layer(x.to(next(layer.parameters())))
