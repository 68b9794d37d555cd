"""Writes a checkpoint: the difference to the pretrained model, or all of the model."""

import json
from pathlib import Path

from torch import nn

from recombine.core.checkpoint import loading, tensor_file
from recombine.core.checkpoint.metadata import FORMAT
from recombine.core.untouched import forget_changed, probe
from recombine.errors import UsageError
from recombine.models import rebuild, roles


def save(model: nn.Module, path: str | Path, whole: bool | None = None) -> Path:
    """Writes the checkpoint of a recombined model, atomically; returns its path.

    A file with all of the model is loaded without the pretrained one. The other kind leaves out what the method did not
    touch, and is loaded onto the pretrained model. A tensor that layers share is stored once. A model inside
    torch.compile or DistributedDataParallel is saved as itself.

    Args:
        whole: store all of the model; None: where it holds fewer parameters than it did before.

    Raises:
        UsageError: the model is not recombined, or it cannot be built again without its weights.
    """
    model, path = unwrapped(model), Path(path)
    if (record := getattr(model, "recombined", None)) is None:
        raise UsageError(f"this {type(model).__name__} is not recombined: save its state_dict instead")
    forget_changed(model, record)
    parameters = dict(model.named_parameters())
    if whole is None:
        whole = sum(p.numel() for p in parameters.values()) < record.total
    own = set() if whole else record.untouched
    tensors = {name: p for name, p in parameters.items() if name not in own}
    tensors |= {name: b for name, b in model.named_buffers() if name in model.state_dict()}
    canonical = {id(p): name for name, p in parameters.items()}
    meta = {
        "format": FORMAT,
        "model": type(model).__name__,
        "source": getattr(model, "recombine_source", None),
        "architecture": record.architecture if whole else None,
        "steps": record.steps,
        "classes": None if (head := roles.head(model)) is None else head.out_features,
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
        "own": {name: probe(p) for name, p in parameters.items() if name in own},
    }
    if whole:
        tensors |= rebuild.own_buffers(model, rebuilt(model, meta, tensors))
    tensor_file.write(path, tensors, meta)
    return path


def rebuilt(model: nn.Module, meta: dict, tensors: dict) -> nn.Module:
    """The model built once from what the file will say of it, without weights.

    Raises:
        UsageError: that is impossible, or gives another model.
    """
    fix = "save the difference to it with recombine.save(..., whole=False)"
    if meta["architecture"] is None:
        raise UsageError(f"this {type(model).__name__} is neither timm's nor transformers' own: {fix}")
    try:
        twin = loading.built_empty(Path("a file of it"), json.loads(json.dumps(meta)), tensors)
    except UsageError as error:
        raise UsageError(
            f"this {type(model).__name__} cannot be built again without its weights ({error}): {fix}"
        ) from error
    if (what := rebuild.differs(model, twin)) is not None:
        raise UsageError(f"this {type(model).__name__} is not what its library would build again ({what}): {fix}")
    return twin


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, without torch.compile's, DistributedDataParallel's or DataParallel's module around it."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        else:
            return model
