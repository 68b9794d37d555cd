"""Writes a checkpoint: the difference to the pretrained model, or all of the model."""

import json
import logging
from pathlib import Path

from torch import Tensor, nn

from recombine.core.checkpoint import loading
from recombine.core.checkpoint.metadata import FORMAT
from recombine.core.rewrite import Record
from recombine.core.untouched import forget_changed, probe
from recombine.errors import UsageError
from recombine.layers.packed import entries, packed_in
from recombine.models import rebuild, roles
from recombine.models.wrappers import unwrapped
from recombine.runtime import tensor_file

log = logging.getLogger(__name__)


def save(model: nn.Module, path: str | Path, whole: bool | None = None) -> Path:
    """Writes the checkpoint of a recombined model, atomically; returns its path.

    A file with all of the model is loaded without the pretrained one. The other kind leaves out what the method did not
    touch, and is loaded onto the pretrained model. A tensor that layers share is stored once. A model inside
    torch.compile or DistributedDataParallel is saved as itself.

    Args:
        whole: store all of the model; None: where it holds fewer parameters than before, or packed ones, or where
            recombine built it with random weights, which nobody has. A model that cannot be built again without its
            weights is then saved as a difference, with a warning.

    Raises:
        UsageError: the model is not recombined, or all of it is asked for and it cannot be built again.
    """
    model, path = unwrapped(model), tensor_file.path_of(path, "a file; say save(model, FILE)")
    if (record := getattr(model, "recombined", None)) is None:
        raise UsageError(f"this {type(model).__name__} is not recombined: save its state_dict instead")
    forget_changed(model, record)
    smaller = sum(entries(model).values()) < record.total or bool(packed_in(model))
    if whole or whole is None and (smaller or starts_at_random(model)):
        try:
            tensor_file.write(path, *everything(model, record))
            return path
        except CannotRebuild as error:
            if whole:
                raise UsageError(f"{error}: save the difference to it with recombine.save(..., whole=False)") from error
            log.warning("%s: holds the difference to the pretrained model only, since %s", path, error)
    tensor_file.write(path, *difference(model, record))
    return path


def save_best(model: nn.Module, path: Path) -> None:
    """`save` as a run keeps its weights: what the pretrained model has not; all of a model that started at random."""
    save(model, path, whole=None if starts_at_random(model) else False)


def starts_at_random(model: nn.Module) -> bool:
    """Whether recombine built the model with random weights."""
    source = getattr(model, "recombine_source", None) or {}
    return source.get("pretrained") is False and source.get("checkpoint") is None


def everything(model: nn.Module, record: Record) -> tuple[dict[str, Tensor], dict]:
    """(tensors, metadata) of a file that holds all of the model.

    Raises:
        CannotRebuild: what the file would say does not give the same model again.
    """
    tensors, meta = described(model, record, leave_out=set())
    meta["architecture"] = record.architecture
    return tensors | rebuild.own_buffers(model, rebuilt(model, meta, tensors)), meta


def difference(model: nn.Module, record: Record) -> tuple[dict[str, Tensor], dict]:
    """(tensors, metadata) of a file that leaves what is untouched to the pretrained model."""
    return described(model, record, record.untouched)


def described(model: nn.Module, record: Record, leave_out: set[str]) -> tuple[dict[str, Tensor], dict]:
    """(tensors, metadata) of the model without the parameters of these names."""
    parameters = dict(model.named_parameters())
    tensors = {name: p for name, p in parameters.items() if name not in leave_out}
    tensors |= {name: b for name, b in model.named_buffers() if name in model.state_dict()}
    canonical = {id(p): name for name, p in parameters.items()}
    return tensors, {
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
        "own": {name: probe(p) for name, p in parameters.items() if name in leave_out},
        "packed": {name: packed.spec() for name, packed in packed_in(model).items()},
    } | ({"bits": record.bits} if record.bits else {})  # which files without a mix, and older readers, do not know


def rebuilt(model: nn.Module, meta: dict, tensors: dict) -> nn.Module:
    """The model built once from what the file will say of it, without weights.

    Raises:
        CannotRebuild: that is impossible, or gives another model.
    """
    kind = type(model).__name__
    if meta["architecture"] is None:
        raise CannotRebuild(f"this {kind} is neither timm's nor transformers' own")
    if getattr(model, "needs_folder", False):
        raise CannotRebuild(f"this {kind} draws with parts that lie in its folder")
    try:
        twin = loading.built_empty(Path("the file"), json.loads(json.dumps(meta)), tensors)
    except UsageError as error:
        raise CannotRebuild(f"this {kind} cannot be built again without its weights ({error})") from error
    if (what := rebuild.differs(model, twin)) is not None:
        raise CannotRebuild(f"this {kind} is not what its library would build again ({what})")
    return twin


class CannotRebuild(Exception):
    """A model cannot be built again from a description without weights."""
