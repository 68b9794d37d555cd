"""Loads a checkpoint: onto the pretrained model, or onto nothing where the file holds all of the model.

Everything is checked on tensors without memory first. A file that does not fit leaves the given model as it was.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from recombine import models
from recombine.core.checkpoint import metadata
from recombine.core.checkpoint.filling import assign, fill, named_tensors, set_parameter
from recombine.core.checks import check_holds_none
from recombine.core.method import Method, method_classes
from recombine.core.places import kept_around
from recombine.core.quantizing import put_empty
from recombine.core.rewrite import Record, Step
from recombine.core.rollback import unchanged
from recombine.core.tied import declare_tied
from recombine.core.untouched import remember
from recombine.errors import UsageError
from recombine.models import rebuild, roles
from recombine.models.wrappers import unwrapped
from recombine.runtime import tensor_file


def load(path: str | Path, model: nn.Module | None = None, *, verify: bool = True) -> nn.Module:
    """Rebuilds the recombined model of a checkpoint: by itself, or on the pretrained one it was made from, in place.

    Args:
        path: a file that `save` wrote, such as outputs/<date>/<run>/best.safetensors.
        model: the pretrained model. None: a file that holds all of the model needs none, and is read as a memory map;
            for another one the pretrained model is built anew from the file's note of its source.
        verify: read the file once before, and compare it with its checksum.

    Raises:
        UsageError: there is no such file, it is damaged or no checkpoint of recombine, or it belongs to another model.
            The given model is unchanged then.
    """
    path = tensor_file.path_of(path, "a checkpoint; say load(FILE) or load(FILE, model)")
    meta, tensors = tensor_file.read(path, verify)
    meta = metadata.validated(path, meta)
    if model is None and meta["architecture"] is not None:
        model = built_empty(path, meta, tensors)
        assign(model, tensors, meta)
        return recorded(model, meta, meta["architecture"], frozen=set())
    if model is None:
        model = pretrained(path, meta["source"])
    wrapped, model = model, unwrapped(model)
    check_holds_none(model)
    if hasattr(model, "recombined"):
        raise UsageError(f"{path}: give the pretrained model as it came, this one is already recombined")
    if type(model).__name__ != meta["model"]:
        raise UsageError(f"{path}: was saved from a {meta['model']}, not from a {type(model).__name__}")
    architecture = rebuild.architecture(model)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    with unchanged(model):
        without_memory(model)
        try_on(path, model, tensors, meta)
    with unchanged(model, only_on_failure=True):
        shape(path, model, meta)
        fill(path, model, tensors, meta)
    recorded(model, meta, architecture, frozen)
    return wrapped


def pretrained(path: Path, source: dict | None) -> nn.Module:
    """The pretrained model that a file names as its source.

    Raises:
        UsageError: it names none, or it cannot be built.
    """
    if source is None:
        raise UsageError(f"{path}: made from a model of your own; give the same model: recombine.load(path, model)")
    try:
        return models.build(**source)
    except UsageError as error:
        raise UsageError(f"{path}: its model cannot be built: {error}") from error
    except Exception as error:  # timm and transformers raise nearly every kind for sizes that do not go together
        raise UsageError(f"{path}: its model cannot be built ({reason(error)}); use another checkpoint") from error


def built_empty(path: Path, meta: dict, tensors: dict[str, Tensor]) -> nn.Module:
    """The recombined model of a file that holds all of it, with parameters on the meta device.

    Raises:
        UsageError: it cannot be built, or the file's tensors do not fit it.
    """
    try:
        model = rebuild.rebuilt(meta["architecture"])
    except Exception as error:  # as above
        raise UsageError(f"{path}: its model cannot be built ({reason(error)}); use another checkpoint") from error
    with unchanged(model):
        try_on(path, model, tensors, meta)
    with rebuild.parameters_on_meta(), torch.random.fork_rng(devices=[]):
        shape(path, model, meta)
    if meta["source"] is None:
        vars(model).pop("recombine_source", None)
    else:
        model.recombine_source = meta["source"]
    return model


def try_on(path: Path, model: nn.Module, tensors: dict[str, Tensor], meta: dict) -> None:
    """Shapes a model of meta tensors as the file says, which takes no memory, and compares with the file's tensors.

    Raises:
        UsageError: the file does not fit.
    """
    with rebuild.parameters_on_meta(), torch.random.fork_rng(devices=[]):
        shape(path, model, meta)
    compare(path, model, tensors, meta)


def without_memory(model: nn.Module) -> None:
    """Puts a parameter of the meta device in the place of every one of the model."""
    twins: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                twin = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
                module._parameters[name] = twins.setdefault(id(p), twin)


def shape(path: Path, model: nn.Module, meta: dict) -> None:
    """Gives a pretrained model the head and the layers of the file, in place; the new ones are empty.

    Raises:
        UsageError: the model has no such layers, or the file's description of them makes no sense.
    """
    try:
        if (roles.classes(model) or 0) != (meta["classes"] or 0):
            models.reset_head(model, meta["classes"] or 0)
        rewritten = tuple(dict.fromkeys(meta["targets"].values()))
        if rewritten:
            roles.find(model, rewritten, nn.Module)  # refuses a model without these roles
        with kept_around(model):
            if meta["blocks"] is None:
                roles.open_layers(model, meta["targets"].keys())  # as the checkpoint has it
            else:  # other blocks will have these names
                roles.split_fused(model, rewritten)
        model.requires_grad_(False)
        with kept_around(model):
            for name, config, layers in meta["steps"]:
                method_class(path, name)(**config).from_spec(model, layers)
            put_empty(model, meta.get("packed", {}), meta["shared"])
        for name, source in meta["shared"].items():
            set_parameter(model, name, model.get_parameter(source))
    except Exception as error:  # a file from elsewhere may say anything
        if isinstance(error, UsageError) and str(error).startswith(str(path)):
            raise
        raise UsageError(f"{path}: does not fit this {type(model).__name__}: {reason(error)}") from error


def reason(error: Exception) -> str:
    """What went wrong, as one line."""
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, UsageError) else f"{type(error).__name__}: {text}"


def compare(path: Path, model: nn.Module, tensors: dict[str, Tensor], meta: dict) -> None:
    """Checks names and shapes of a file's tensors against a model that has the file's layers.

    Raises:
        UsageError: a tensor is missing, too much, or has another shape.
    """
    present = named_tensors(model, tensors)
    for name in present.keys() - tensors.keys() - meta["own"].keys() - meta["shared"].keys():
        raise UsageError(f"{path}: holds no {name}, so it is from another model; give the one it was saved from")
    for name, tensor in tensors.items():
        if name not in present or present[name].shape != tensor.shape:
            here = tuple(present[name].shape) if name in present else "nothing"
            raise UsageError(f"{path}: {name} is {tuple(tensor.shape)} in the file and {here} in this model")
        if present[name].is_floating_point() != tensor.is_floating_point():
            raise UsageError(f"{path}: {name} is {tensor.dtype} in the file and {present[name].dtype} in this model")
    for name in meta["own"].keys() - present.keys():
        raise UsageError(f"{path}: {name} is not in this model; load the same pretrained one")
    for name in set(meta["trains"]) - present.keys():
        raise UsageError(f"{path}: says that {name} trains, which is not in this model; use another checkpoint")


def recorded(model: nn.Module, meta: dict, architecture: dict | None, frozen: set[str]) -> nn.Module:
    """The model with its record, and trainable what trained when it was saved. frozen: names, before any method."""
    model.recombined = Record(
        steps=[Step(*step) for step in meta["steps"]],
        targets=meta["targets"],
        dense=meta["dense"],
        total=meta["total"],
        untouched=set(meta["own"]),
        trainable=set(meta["trains"]),
        blocks=meta["blocks"],
        architecture=architecture,
        frozen=frozen,
        bits=meta["bits"],
    )
    declare_tied(model)
    for name, p in model.named_parameters():
        p.requires_grad_(name in meta["trains"])
    remember(model, model.recombined)
    return model.train(model.training)


def method_class(path: Path, name: str) -> type[Method]:
    """The class of the method with that name, those of the user's own modules included.

    Raises:
        UsageError: no module that is imported defines it.
    """
    if (cls := method_classes().get(name)) is None:
        raise UsageError(
            f"{path}: was made with the method {name}, which is not here; import the module that defines it"
        )
    return cls
