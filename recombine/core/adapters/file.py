"""An adapter's file: safetensors with a checksum that hold what trained and the head, and marks of the base."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, StringConstraints, ValidationError
from torch import nn

from recombine.core.adapters.live import whole
from recombine.core.checkpoint.metadata import Classes, Count, Identifier, ModuleName, Number, Step, Strict, Word, first
from recombine.core.checkpoint.saving import described
from recombine.core.untouched import Mark, forget_changed, probe, total
from recombine.errors import UsageError
from recombine.models import roles
from recombine.runtime import tensor_file

FORMAT = 1
OnBase = tuple[Word, Annotated[int, Field(ge=0, lt=2**64)], Annotated[list[Number], Field(min_length=4, max_length=4)]]


class AdapterMetadata(Strict):
    """All that an adapter's file says beside its tensors.

    steps: as in a checkpoint; those that the base has by itself come first.
    own: type, fingerprint and four entries of every tensor that the file leaves to the base.
    labels: names of the classes.
    The rest: see `recombine.core.rewrite.Record`.
    """

    adapter: Literal[1]
    model: Identifier
    steps: Annotated[list[Step], Field(max_length=100)]
    classes: Classes | None
    labels: list[Annotated[str, StringConstraints(max_length=1000)]] | None
    targets: dict[ModuleName, Word]
    dense: Count
    total: Count
    trains: list[ModuleName]
    blocks: list[Annotated[int, Field(ge=0, le=4096)]] | None
    shared: dict[ModuleName, ModuleName]
    own: dict[ModuleName, Annotated[OnBase, Field(strict=False)]]
    checksum: Literal["sha256"] | None = None


def save_adapter(model: nn.Module, path: str | Path, labels: Sequence[str] | None = None) -> Path:
    """Writes what trained and the head of a recombined model, atomically; returns the path.

    Everything else is the base's: the pretrained model where a method added its tensors to it (LoRA, SSF, RoSA), or the
    model as the method left it (CRISP, CERSA, SVFT, ...), which any `recombine.save` of it keeps. What trained and was
    frozen again is in the file.

    Args:
        labels: names of the classes, in the order of the head's outputs.

    Raises:
        UsageError: the model is not recombined, or there are not as many labels as classes.
    """
    model, path = whole(model), tensor_file.path_of(path, "a file; say save_adapter(model, FILE)")
    if (record := getattr(model, "recombined", None)) is None:
        raise UsageError(f"this {type(model).__name__} is not recombined: no method says what an adapter of it holds")
    forget_changed(model, record)
    head, parameters = head_of(model), dict(model.named_parameters())
    trained = record.trainable | (record.marks.keys() - record.untouched)
    own = {n: p for n, p in parameters.items() if not (p.requires_grad or n in trained or id(p) in head)}
    tensors, meta = described(model, record, set(own))
    if labels is not None and len(labels) != meta["classes"]:
        raise UsageError(f"labels: there are {len(labels)} of them, and the head tells {meta['classes']} classes apart")
    marks = {name: [str(p.dtype).removeprefix("torch."), *mark_of(p)] for name, p in own.items()}
    trains = sorted(parameters.keys() - own.keys())
    kept = {key: meta[key] for key in AdapterMetadata.model_fields.keys() & meta.keys()}
    own_part = {"adapter": FORMAT, "own": marks, "trains": trains, "labels": labels and [*map(str, labels)]}
    tensor_file.write(path, tensors, kept | own_part)
    return path


def head_of(model: nn.Module) -> set[int]:
    """The ids of the head's parameters."""
    return set() if (head := roles.head(model)) is None else {id(p) for p in head.parameters()}


def mark_of(tensor: torch.Tensor) -> tuple[int, list[float]]:
    """What `untouched.Mark` holds of a tensor's values, in few digits."""
    return total(tensor), [float(f"{value:.6g}") for value in probe(tensor)]


def read(path: str | Path, verify: bool = True) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """(metadata, tensors) of an adapter's file, once the metadata are known to follow the schema.

    Raises:
        UsageError: there is no such file, it is damaged, or it is no adapter.
    """
    path = tensor_file.path_of(path, "an adapter's file; say load_adapter(model, FILE)")
    meta, tensors = tensor_file.read(path, verify)
    if not isinstance(meta, dict) or "adapter" not in meta:
        raise UsageError(f"{path}: holds no adapter; recombine.load reads whole models, save_adapter writes adapters")
    try:
        AdapterMetadata.model_validate(meta)
    except (ValidationError, RecursionError) as error:
        raise UsageError(f"{path}: its metadata are malformed ({first(error)}); use another file") from error
    if not set(meta["trains"]) <= tensors.keys() - meta["own"].keys():
        raise UsageError(f"{path}: says that a tensor trains which it does not hold; use another file")
    own = {name: Mark(getattr(torch, dtype, None), *values) for name, (dtype, *values) in meta["own"].items()}
    return meta | {"own": own}, tensors
