"""Merging into an ordinary model, and checkpoints: one safetensors file without the backbone's untouched tensors.

A checkpoint stores every other tensor and the shapes of the layers. Loading factorises nothing again: signs and gauges
stay, so a resumed model gives the same output. Nothing is unpickled.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from recombine import models
from recombine.core.method import Method, method_classes
from recombine.core.rewrite import Record, Step
from recombine.core.rollback import unchanged_on_failure
from recombine.errors import UsageError
from recombine.models import roles
from recombine.models.fused_qkv import close
from recombine.runtime.atomic import atomic_write

FORMAT = 2


def merge(model: nn.Module) -> nn.Module:
    """Turns every recombined layer back into an ordinary linear one, in place; returns the model.

    The outputs stay the same. Afterwards every parameter is trainable.

    Raises:
        UsageError: the model is not recombined.
    """
    if (record := getattr(model, "recombined", None)) is None:
        raise UsageError(f"this {type(model).__name__} is not recombined: there is nothing to merge")
    for name in record.targets:
        model.set_submodule(name, merged(model.get_submodule(name)))
    close(model)
    del model.recombined
    return model.requires_grad_(True)


def merged(layer: nn.Module) -> nn.Module:
    """The ordinary layer with the same outputs, whatever methods were applied to it and in which order."""
    if hasattr(layer, "get_base_layer"):  # peft
        layer.base_layer = merged(layer.get_base_layer())
        layer.merge()
        return layer.get_base_layer()
    return layer.merged() if callable(getattr(layer, "merged", None)) else layer


def save(model: nn.Module, path: str | Path) -> Path:
    """Writes the checkpoint of a recombined model, atomically; returns its path.

    Raises:
        UsageError: the model is not recombined.
    """
    if (record := getattr(model, "recombined", None)) is None:
        raise UsageError(f"this {type(model).__name__} is not recombined: save its state_dict instead")
    record.untouched -= {name for name, p in model.named_parameters() if p.requires_grad}  # unfrozen by the user since
    tensors = {name: p for name, p in model.named_parameters() if name not in record.untouched}
    tensors |= {name: b for name, b in model.named_buffers() if name in model.state_dict()}
    canonical = {id(p): name for name, p in model.named_parameters()}
    meta = {
        "format": FORMAT,
        "model": type(model).__name__,
        "source": getattr(model, "recombine_source", None),
        "steps": record.steps,
        "classes": roles.classes(model),
        "targets": record.targets,
        "dense": record.dense,
        "total": record.total,
        "trains": sorted(record.trainable),
        "blocks": record.blocks,
        "shared": {
            name: canonical[id(p)]
            for name, p in model.named_parameters(remove_duplicate=False)
            if canonical[id(p)] != name
        },
        "own": {name: fingerprint(p) for name, p in model.named_parameters() if name in record.untouched},
    }
    path = Path(path)
    with atomic_write(path) as temporary:
        data = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        save_file(data, temporary, {"recombine": json.dumps(meta)})
    return path


def load(path: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Rebuilds the recombined model of a checkpoint on the pretrained one it was made from, in place.

    Args:
        path: a file that `save` wrote, such as outputs/<date>/<run>/best.safetensors.
        model: the pretrained model; None: it is built anew from the checkpoint's note of its source.

    Raises:
        UsageError: there is no such file, it is damaged or no checkpoint of recombine, or it belongs to another model.
    """
    path = Path(path)
    meta, tensors = read(path)
    if model is None:
        if meta["source"] is None:
            raise UsageError(f"{path}: made from a model of your own; give the same model: recombine.load(path, model)")
        model = models.build(**meta["source"])
    if hasattr(model, "recombined"):
        raise UsageError(f"{path}: give the pretrained model as it came, this one is already recombined")
    if type(model).__name__ != meta["model"]:
        raise UsageError(f"{path}: was saved from a {meta['model']}, not from a {type(model).__name__}")
    with unchanged_on_failure(model):
        return _rebuilt(path, model, meta, tensors)


def _rebuilt(path: Path, model: nn.Module, meta: dict, tensors: dict[str, torch.Tensor]) -> nn.Module:
    if meta["classes"] is not None and roles.classes(model) != meta["classes"]:
        models.reset_head(model, meta["classes"])
    try:
        rewritten = tuple(meta["targets"].values())
        roles.find(model, rewritten, nn.Module)  # refuses a model without these roles
        if meta["blocks"] is None:
            roles.open_layers(model, meta["targets"].keys())  # as the checkpoint has it
        else:  # other blocks will have these names
            roles.split_fused(model, rewritten)
        model.requires_grad_(False)
        for name, config, layers in meta["steps"]:
            method_class(path, name)(**config).from_spec(model, layers)
    except (AttributeError, StopIteration, TypeError, UsageError) as error:
        raise UsageError(f"{path}: does not fit this {type(model).__name__}: {error}") from error
    for name, source in meta["shared"].items():
        set_parameter(model, name, model.get_parameter(source))
    fill(path, model, tensors, meta)
    model.recombined = Record(
        steps=[Step(*step) for step in meta["steps"]],
        targets=meta["targets"],
        dense=meta["dense"],
        total=meta["total"],
        untouched=set(meta["own"]),
        trainable=set(meta["trains"]),
        blocks=meta["blocks"],
    )
    for name, p in model.named_parameters():
        p.requires_grad_(name in meta["trains"])
    return model.train(model.training)


def fill(path: Path, model: nn.Module, tensors: dict, meta: dict) -> None:
    """Copies a checkpoint's tensors into the model, once all are known to fit and the backbone to be the same.

    Raises:
        UsageError: a tensor is missing or has another shape, or the backbone differs from the one saved with.
    """
    present = dict(model.named_parameters()) | {n: b for n, b in model.named_buffers() if n in model.state_dict()}
    for name in present.keys() - tensors.keys() - meta["own"].keys() - meta["shared"].keys():
        raise UsageError(f"{path}: holds no {name}, so it is from another model; give the one it was saved from")
    for name, tensor in tensors.items():
        if name not in present or present[name].shape != tensor.shape:
            shape = tuple(present[name].shape) if name in present else "nothing"
            raise UsageError(f"{path}: {name} is {tuple(tensor.shape)} in the file and {shape} in this model")
    for name, expected in meta["own"].items():
        if name not in present or not torch.allclose(
            torch.tensor(fingerprint(present[name])),
            torch.tensor(expected),
            rtol=1e-5 if present[name].dtype == torch.float32 else 1e-2,
        ):
            raise UsageError(
                f"{path}: {name} differs from the backbone it was saved with; load the same pretrained one"
            )
    with torch.no_grad():
        for name, tensor in tensors.items():
            present[name].copy_(tensor)


def read(path: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """(metadata, tensors by name) of a checkpoint.

    Raises:
        UsageError: there is no such file, it is damaged, or it is no checkpoint of recombine.
    """
    if not path.is_file():
        raise UsageError(f"checkpoint={path}: no such file; result.json names the checkpoint of a run")
    try:
        with safe_open(path, "pt") as file:
            meta = json.loads((file.metadata() or {}).get("recombine", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"{path}: truncated or corrupted ({reason}); use another checkpoint") from error
    if meta is None or meta.get("format") != FORMAT:
        raise UsageError(f"{path}: not a checkpoint of recombine; model.checkpoint=FILE loads a plain model's weights")
    return meta, tensors


def fingerprint(tensor: torch.Tensor) -> list[float]:
    """Four evenly spaced entries of a tensor, by which an untouched one is recognised; of an empty one none."""
    flat = tensor.detach().flatten()
    if not len(flat):  # DINOv3 without register tokens
        return []
    return flat[torch.linspace(0, len(flat) - 1, 4, dtype=torch.float64).long()].float().tolist()


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


def set_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Puts a parameter at a dotted name of the model."""
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, parameter)
