"""Checks around peft: options that it would ignore silently, and its many kinds of errors as one line."""

import logging
import re
import warnings
from contextlib import contextmanager
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from recombine.core.footprint import Endless
from recombine.core.method import Site
from recombine.errors import UsageError
from recombine.layers import PackedLinear, RecombinedLinear
from recombine.layers.packed import dtype_of
from recombine.methods.ranks import widths
from recombine.models.allowed import refuse

log = logging.getLogger(__name__)

ELSEWHERE = re.compile("megatron|path|mapping|model|tokenizer|revision|modules_to_save")  # in the names of options
NOT_IDENTITY = 1e-4  # relative change of a layer's output that rounding does not explain
UNFIT = {  # classes that peft has and this method cannot use -> why
    "AdaLoraConfig": "its ranks shrink only in a training loop that calls it at every step",
    "AdamssConfig": "it reads the weights, which are not there when sizes are counted",
    "FrodConfig": "it reads the weights, which are not there when sizes are counted",
    "LNTuningConfig": "on a linear layer it is full fine-tuning; say method=full",
    "LilyConfig": "its router looks at each input, so it cannot be merged",
}


def check_config(config: str, rank: int | None, options: dict[str, Any], sites: list[Site]) -> None:
    """Checks the class of a peft method, its rank and the names of its options.

    Args:
        config: such as LoraConfig.
        options: such as {"use_dora": True}.

    Raises:
        UsageError: peft has no such class, the class adapts no linear layers, it lacks an option, or it has no such
            rank.
    """
    known = {f.name for f in fields(adapter_config(config, options))}
    if why := UNFIT.get(config):
        raise UsageError(f"method.config={config!r}: {why}; choose another, such as LoraConfig")
    if "target_modules" not in known:
        raise UsageError(f"method.config={config!r}: adapts no linear layers; choose one that does: LoraConfig")
    for key in options:
        if key not in known or key in ("r", "target_modules"):
            near = get_close_matches(key, known - {"r", "target_modules"}, 3) or sorted(known)
            raise UsageError(f"method.options.{key}: {config} takes no such option; near: {', '.join(near)}")
    if rank is None:
        return
    if "r" not in known:
        raise UsageError(f"method.rank={rank}: {config} has no rank; set method.rank=null")
    by_layer = "rank_pattern" in known
    most = max(widths(sites).values()) if by_layer else narrowest(sites)
    if not 1 <= rank <= most:
        which = "widest" if by_layer else "narrowest"
        raise UsageError(f"method.rank={rank}: must be from 1 to {most}, the {which} target layer")


def adapter_config(config: str, options: dict[str, Any]) -> type:
    """The peft configuration class of that name, once its options are known to name no code and no file.

    Raises:
        UsageError: peft has no such class, or an option is no plain value of an adapter.
    """
    import peft

    kinds = [k for k in dir(peft) if k.endswith("Config") and issubclass(getattr(peft, k), peft.PeftConfig)]
    if config not in kinds:
        near = get_close_matches(str(config), kinds, 3) or ["LoraConfig"]
        raise UsageError(
            f"method.config={config!r}: peft {peft.__version__} has no such class; near: {', '.join(near)}"
        )
    for key, value in options.items():
        if ELSEWHERE.search(key):
            raise UsageError(f"method.options.{key}={value!r}: it names code or files outside the adapter; drop it")
        refuse(f"method.options.{key}", value, largest=2**31)
    return getattr(peft, config)


def check_options(options: dict[str, Any], targets: tuple[str, ...], sites: list[Site]) -> None:
    """Checks the options that peft would accept without doing what they say.

    Raises:
        UsageError: feedforward_modules names a role that is no target, BOFT's extension cannot be built, LoRA-GA has
            no gradients, or init_lora_weights takes a part of a weight that a compressed layer does not hold.
    """
    named = [target.removesuffix("?") for target in targets]
    for role in options.get("feedforward_modules") or ():
        if role not in named:
            raise UsageError(f"method.options.feedforward_modules: {role!r} is not in targets {' '.join(named)}")
    if (factor := options.get("boft_n_butterfly_factor", 1)) != 1 and not butterflies():
        why = "peft's CUDA extension for it cannot be built here and peft would use one factor: set it to 1"
        raise UsageError(f"method.options.boft_n_butterfly_factor={factor}: {why}")
    init = options.get("init_lora_weights", True)
    if init == "lora_ga":
        why = "needs gradients that peft collects in a loop of its own, and would be a plain LoRA; take eva or corda"
        raise UsageError(f"method.options.init_lora_weights=lora_ga: {why}")
    for site in sites:
        compressed = isinstance(site.module, RecombinedLinear | PackedLinear)
        if compressed and isinstance(init, str) and init not in ("gaussian", "eva"):
            why = f"{site.name} is a {type(site.module).__name__}, which holds no weight to take a part of"
            raise UsageError(f"method.options.init_lora_weights={init}: {why}; set it to true")


def check_blocks(rank: int | None, options: dict[str, Any], sites: list[Site]) -> None:
    """Checks OFT's blocks, which peft would change to others.

    Raises:
        UsageError: their number (the rank) or size does not divide the input width of a layer.
    """
    size = options.get("oft_block_size", 32)
    key, value = ("method.options.oft_block_size", size) if size else ("method.rank", rank)
    for site in sites:
        width = site.module.in_features
        if not isinstance(value, int) or value < 1 or width % value:
            raise UsageError(f"{key}={value!r}: must divide the input width of {site.name}, {width}")


@contextmanager
def one_line(config: str, options: dict[str, Any]):
    """Turns whatever peft raises inside the block into one line for the user.

    Raises:
        UsageError: peft raised.
    """
    try:
        yield
    except Endless:
        raise
    except Exception as error:  # peft raises nearly every kind
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UsageError(f"method.options={options}: {config}: {reason}; change that option") from error


def narrowest(sites: list[Site]) -> int:
    """The largest rank that every target layer can have. No weight of a compressed layer is built for it."""
    return min(widths(sites).values())


def butterflies() -> bool:
    """Whether peft finds or builds the CUDA extension that BOFT needs for more than one butterfly factor."""
    from peft.tuners.boft.layer import get_fbd_cuda

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return bool(get_fbd_cuda())


def warn_if_moved(config: str, before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    """Logs a warning where the adapter changes a layer's output at the start.

    Args:
        before, after: outputs (8, out) of `output`, by module name, without and with the adapter.
    """
    changes = {name: ((after[name] - y).norm() / y.norm().clamp(min=1e-30)).item() for name, y in before.items()}
    worst = max(changes, key=changes.get)
    if not changes[worst] <= NOT_IDENTITY:
        text = "%s is not the identity at the start: it changes the output of %s, the most, by %.2g of its norm"
        log.warning(text, config, worst, changes[worst])


def output(layer: nn.Module) -> Tensor:
    """The output (8, out) of a layer for Gaussian inputs that are the same every time."""
    x = torch.randn(8, layer.in_features, generator=torch.Generator().manual_seed(0))
    return layer(x.to(next(layer.parameters()).device, dtype_of(layer)))
