"""What a user may hand to `apply`: everything else is refused in one line before anything happens."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from recombine.core.calibration import Losses
from recombine.core.method import Method, Site, method_classes
from recombine.core.rollback import HELD
from recombine.errors import UsageError
from recombine.layers import PackedLinear, RecombinedLinear
from recombine.models.wrappers import unwrapped
from recombine.runtime.mapped import release

WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a word", NoneType: "none"}


def check_call(model: nn.Module, method: Method) -> None:
    """Checks the model and the method of a call.

    Raises:
        UsageError: either is something else, or the model cannot be rewritten as it stands.
    """
    if isinstance(method, type) or not isinstance(method, Method):
        word = method.__name__ if isinstance(method, type) else str(method)
        name = {name.lower(): name for name in method_classes()}.get(word.lower(), "Svd")
        what = "a class" if isinstance(method, type) else f"a {type(method).__name__}"
        raise UsageError(f"method={word} is {what}: give an object of a method, such as recombine.{name}()")
    inner = unwrapped(model)
    if isinstance(model, DataParallel | DistributedDataParallel):
        why = "keeps a list of the parameters that it was made with: apply to the model first, then wrap it"
        raise UsageError(f"model is wrapped in {type(model).__name__}, which {why}")
    check_holds_none(inner)
    if torch.is_inference_mode_enabled():
        raise UsageError("apply runs in torch.inference_mode, where no weight can ever train: leave it, or use no_grad")
    for name, p in model.named_parameters():
        if p.is_meta:
            raise UsageError(f"{name} is on torch's meta device and has no values: load the weights before apply")
        if p.is_inference():
            raise UsageError(f"{name} was made in torch.inference_mode and can never train: load the model outside it")


def check_holds_none(model: nn.Module) -> None:
    """Refuses a model that holds adapters: putting one on or off would undo what is done to its layers.

    Raises:
        UsageError: it holds some.
    """
    if HELD in vars(model):
        why = "which stand in its layers' places: give the base without them, a copy or a file loaded anew"
        raise UsageError(f"model holds adapters ({', '.join(vars(model)[HELD].named)}), {why}")


def check_fields(part: Any, key: str) -> None:
    """Checks the types of a method's fields, and of the parts that it is made of, against their annotations.

    Args:
        key: what an error calls it, for example "method".

    Raises:
        UsageError: a value has another type, or two do not go together.
    """
    hints = get_type_hints(type(part))
    for field in fields(part):
        value, hint = getattr(part, field.name), hints[field.name]
        if field.name == "targets":  # `roles.find` says which roles there are
            continue
        if not _fits(value, hint):
            kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
            wanted = " or ".join(WORDS.get(kind, str(getattr(kind, "__name__", kind))) for kind in kinds)
            raise UsageError(f"{key}.{field.name}={value!r}: must be {wanted}, not a {type(value).__name__}")
        if is_dataclass(value):
            check_fields(value, f"{key}.{field.name}")
    if reason := getattr(part, "contradiction", lambda key: None)(key):
        raise UsageError(reason)


@contextmanager
def fields_as_typed(method: Method) -> Iterator[None]:
    """Errors of the block that name a field of this method name it as it was typed: compressor.rank."""
    try:
        yield
    except UsageError as error:
        if not str(error).startswith("method."):
            raise
        raise UsageError(method.key + str(error).removeprefix("method")) from error


def _fits(value: Any, hint: Any) -> bool:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, kind) for kind in inner)
    if origin in (tuple, list):  # a YAML knows lists only
        return isinstance(value, tuple | list) and all(_fits(v, inner[0]) for v in value)
    if hint in (int, float):
        kinds = int if hint is int else int | float  # a file holds no others: numpy's integers cannot be saved
        return isinstance(value, kinds) and not isinstance(value, bool)
    kind = origin or hint
    return not isinstance(kind, type) or isinstance(value, kind)


def checked(losses: Losses | None) -> Losses | None:
    """The same losses, each of which is looked at before it is used.

    A model that torch.compile gave runs uncompiled in them: in what is compiled hooks put on later are not seen.

    Raises:
        UsageError: losses is no function, does not yield when it is called, or yields something else than scalars.
    """
    how = "give a function that yields the loss of batch after batch: lambda: (loss_of(batch) for batch in batches)"
    if losses is None:
        return None
    if not callable(losses):
        raise UsageError(f"losses is a {type(losses).__name__}: {how}")

    def each() -> Iterator[Tensor]:
        found = losses()
        if isinstance(found, Tensor) or not isinstance(found, Iterable):
            raise UsageError(f"losses() returns a {type(found).__name__}: {how}")
        found, end = iter(found), object()
        while True:
            with torch.compiler.set_stance("force_eager"):
                loss = next(found, end)
            if loss is end:
                return
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                what = f"a tensor {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
                raise UsageError(f"losses() yields {what}: yield each batch's loss alone, as a scalar tensor")
            yield loss

    return each


def check_layers(model: nn.Module, method: Method, sites: list[Site]) -> None:
    """Checks that the target layers are what they seem: finite, not tied to others, and x -> W x + b.

    Raises:
        UsageError: a layer is not; the message names it.
    """
    owners: dict[int, str] = {}
    for name, module in model.named_modules():
        for p in module._parameters.values():
            owners.setdefault(id(p), name)
    seen = set()
    for site in sites:
        for key, p in site.module.named_parameters():
            if id(p) not in seen and not p.is_meta and not _finite(p):
                raise UsageError(f"{site.name}.{key} is not finite: the checkpoint is damaged, load another")
            seen.add(id(p))
            release([p])
        if nn.Module in method.target_types or not isinstance(site.module, nn.Linear):
            continue
        if isinstance(site.module, PackedLinear) and RecombinedLinear not in method.target_types:
            why = "which LoRA can adapt and nothing can rewrite; apply the method first and quantize then"
            raise UsageError(f"{site.name} holds packed integers, {why}")
        if (owner := owners.get(id(site.module.weight), site.name)) != site.name:
            why = "rewriting one would untie them; leave its role out of targets"
            raise UsageError(f"{site.name} shares its weight with {owner}: {why}")
        if not _is_linear(site.module):
            kind = type(site.module).__name__
            raise UsageError(f"{site.name} is a {kind}, which does more than W x + b: leave its role out of targets")


def _finite(p: Tensor) -> bool:
    """Whether all entries are finite; no mask of them is made."""
    return not p.numel() or not p.is_floating_point() or all(end.isfinite() for end in p.detach().aminmax())


@torch.no_grad()
def _is_linear(layer: nn.Linear) -> bool:
    """Whether a subclass of nn.Linear with a forward of its own still gives W x + b."""
    if type(layer).forward is nn.Linear.forward or layer.weight.is_meta:
        return True
    if not layer.weight.is_floating_point():
        return False
    x = torch.linspace(-1, 1, layer.in_features).to(layer.weight)[None]
    return torch.allclose(layer.forward(x), F.linear(x, layer.weight, layer.bias), rtol=1e-2, atol=1e-3)
