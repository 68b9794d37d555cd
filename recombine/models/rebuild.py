"""A model's architecture as plain values, and the model built from them again without weights.

    {"library": "timm", "arch": "vit_small_patch16_224", ...}        the arguments of `models.build`
    {"library": "diffusers", "arch": "unet", "text": "minilm", ...}          also of `models.build`
    {"library": "transformers", "class": "LlamaForCausalLM", "attention": "sdpa", "config": {...}}

What comes from a file is checked by `models.allowed` before it reaches either library.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from recombine import models
from recombine.errors import UsageError
from recombine.models.allowed import LARGEST, TIMM, config_values, refuse

ATTENTION = ("eager", "sdpa")
OF_THE_WEIGHTS = ("pretrained", "checkpoint", "num_classes", "id", "revision")  # of a source, and of the head
NOT_BUILT_FROM = ("transformers_version", "architectures", "model_type", "dtype", "torch_dtype", "_name_or_path")


def architecture(model: nn.Module) -> dict[str, Any] | None:
    """How to build a model of timm, transformers or diffusers again; None: it is none of these.

    That says what it was built from. Whether the model still is that, `differs` tells.
    """
    if hasattr(model, "config") and type(model).__module__.startswith(("transformers.", "recombine.models.")):
        config = configuration(model.config)
        attention = getattr(model.config, "_attn_implementation", None)
        return {"library": "transformers", "class": type(model).__name__, "attention": attention, "config": config}
    if (source := getattr(model, "recombine_source", None)) is not None:
        return {"library": "timm", **{key: value for key, value in source.items() if key not in OF_THE_WEIGHTS}}
    if (known := getattr(model, "pretrained_cfg", None)) and type(model).__module__.startswith("timm."):
        size = getattr(getattr(model, "patch_embed", None), "img_size", None)
        return {
            "library": "timm",
            "name": known["architecture"],
            "arch": known["architecture"],
            "tag": None if known.get("tag") in ("", "untrained") else known.get("tag"),
            "image_size": size and size[0],
            **noted(model),
            **({"global_pool": model.global_pool} if isinstance(getattr(model, "global_pool", None), str) else {}),
        }
    return None


def configuration(config: Any) -> dict[str, Any]:
    """What a transformers configuration sets to something else than its class does. Hub files also hold keys that the
    class does not declare; `differs` finds a model that needs one of them."""
    from recombine.models import encoders

    usual, also = type(config)().to_dict(), encoders.UNDECLARED
    known = {key: value for key, value in config.to_diff_dict().items() if key in usual or key in also}
    return {k: v for k, v in known.items() if k not in NOT_BUILT_FROM and (k not in usual or usual[k] != v)}


def noted(model: nn.Module) -> dict[str, Any]:
    """What timm's own note says that a model was built with, as far as a file may say it."""
    from timm.models import get_model_args

    rates = [module.drop_prob for module in model.modules() if type(module).__name__ == "DropPath"]
    found = {"drop_path": max(rates)} if rates else {}
    for key, value in get_model_args(model).items():
        if key in TIMM and is_plain(value):
            found[key] = list(value) if isinstance(value, tuple) else value
    return found


def is_plain(value: Any) -> bool:
    """Whether a file may say it."""
    try:
        refuse("", value, LARGEST)
    except UsageError:
        return False
    return True


def rebuilt(architecture: Mapping[str, Any]) -> nn.Module:
    """The model of an architecture. Its parameters lie on torch's meta device; its buffers are real.

    Raises:
        UsageError: the architecture names what is not known or not allowed.
    """
    return without_weights(partial(made, architecture))


def without_weights(build: Callable[[], nn.Module]) -> nn.Module:
    """The model that is built so. Its parameters lie on torch's meta device; its buffers are real."""
    with torch.random.fork_rng(devices=[]), in_float32():
        try:
            with parameters_on_meta():
                model = build()
            if not any(buffer.is_meta for buffer in model.buffers()):
                return model
        except (NotImplementedError, UsageError) as error:  # a constructor that reads its weights, as Swin v2's does
            if not isinstance(error.__cause__ or error, NotImplementedError):
                raise
        model = build()  # tables are made from its weights, or on their device
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad)
    return model


@contextmanager
def in_float32() -> Iterator[None]:
    """While the block runs, new tensors are float32: a process's default dtype would round the tables of positions."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def made(architecture: Mapping[str, Any]) -> nn.Module:
    """The model of an architecture, with the weights that its library starts with. Raises as `rebuilt` does."""
    rest = {key: value for key, value in architecture.items() if key != "library"}
    if architecture["library"] == "timm":
        return models.timm_model(**rest, pretrained=False)
    if architecture["library"] == "diffusers":
        return models.build(**architecture, pretrained=False)
    return of_transformers(**rest)


def of_transformers(*, config: Mapping[str, Any], attention: str | None, **named: str) -> nn.Module:
    """A transformers model of the class of that name, without weights.

    Raises:
        UsageError: transformers has no such model, or its configuration refuses the values.
    """
    import transformers

    from recombine.models import encoders

    name = named["class"]
    cls = {cls.__name__: cls for cls in encoders.MODELS.values()}.get(name)
    if cls is None and re.fullmatch(r"[A-Z]\w*", name):
        cls = getattr(transformers, name, None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel) and cls.config_class):
        raise UsageError(f"transformers {transformers.__version__} has no model of the class {name}")
    if attention not in ATTENTION:
        raise UsageError(f"attention={attention!r}: must be one of {', '.join(ATTENTION)}")
    config_values(cls.config_class, config, encoders.UNDECLARED)
    return cls._from_config(cls.config_class.from_dict(dict(config)), attn_implementation=attention)


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """While the block runs, every parameter of a new module is moved to the meta device as it is registered.

    Nothing is initialised then, and what `torch.empty` reserved is given back untouched. Buffers stay real: tables of
    positions are computed in the constructor, and no file holds them.
    """
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and param.device.type != "meta":
            param = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
        register(module, name, param)

    nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def differs(model: nn.Module, other: nn.Module) -> str | None:
    """The first thing in which two models compute differently, whatever their weights; None: there is none.

    Compared are the modules, their classes and their plain attributes.
    """
    mine, theirs = dict(model.named_modules()), dict(other.named_modules())
    for name in [*mine, *theirs]:
        if class_of(mine.get(name)) is not class_of(theirs.get(name)):
            kinds = (class_of(modules.get(name)).__name__ for modules in (mine, theirs))
            return f"{name or 'the model'} is a {' and not a '.join(kinds)}"
        here, there = plain_attributes(mine[name]), plain_attributes(theirs[name])
        for key in here.keys() & there.keys():
            if here[key] != there[key]:
                return f"{name}.{key} is {here[key]} and not {there[key]}".lstrip(".")
    return None


def class_of(module: nn.Module | None) -> type:
    """The class; of a module with parametrized tensors, for which torch makes one of its own, the one before."""
    cls = type(module)
    return cls.__mro__[1] if module is not None and is_parametrized(module) else cls


def own_buffers(model: nn.Module, other: nn.Module) -> dict[str, torch.Tensor]:
    """The buffers that no state dict holds and that the other model has not built with the same values, by name."""
    kept, theirs = model.state_dict().keys(), dict(other.named_buffers())
    return {
        name: buffer
        for name, buffer in model.named_buffers()
        if name not in kept and not same(buffer, theirs.get(name))
    }


def plain_attributes(module: nn.Module) -> dict[str, Any]:
    """What a module keeps as numbers, words or lists of these; not whether it trains, nor its caches."""
    kinds, skipped = (bool, int, float, str), ("training", "own_classes", "recombine_source")
    values = {key: list(x) if isinstance(x, list | tuple) else [x] for key, x in vars(module).items()}
    return {
        key: value
        for key, value in values.items()
        if not key.startswith("_") and key not in skipped and all(isinstance(x, kinds) for x in value)
    }


def same(one: torch.Tensor, other: torch.Tensor | None) -> bool:
    """Whether two buffers hold equal values, on whatever device."""
    if (
        other is None
        or one.dtype != other.dtype
        or one.shape != other.shape
        or "meta" in (one.device.type, other.device.type)
    ):
        return False
    return torch.equal(one.cpu(), other.cpu())
