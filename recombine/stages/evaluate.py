"""Score a checkpoint on the test set; without one, the original model, as far as it can do the task untrained."""

from torch import nn

from recombine import models
from recombine.data.base import DataModule
from recombine.errors import UsageError
from recombine.layers.quantize import quantize
from recombine.models import roles
from recombine.result_schema import StagePart
from recombine.stages.adapt import test
from recombine.stages.checkpoints import load_checkpoint
from recombine.stages.context import RunContext
from recombine.training.lit import LitRecombine


def evaluate(run: RunContext) -> StagePart:
    """The scores on the test set, and the checkpoint's path."""
    path, bits = load_checkpoint(run), run.settings.stage.bits
    if bits is not None:
        if (record := getattr(run.model, "recombined", None)) is None:
            roles.split_fused(run.model, run.method.targets)
        names = roles.find(run.model, run.method.targets) if record is None else record.targets
        quantize(map(run.model.get_submodule, names), bits)
    run.quantize()
    return test(run, LitRecombine(run.model, run.method, run.objective())) | {"checkpoint": path}


def require_head(model: nn.Module, data: DataModule) -> None:
    """Refuses to score a model whose weights brought no classifier for the data; a language model needs none."""
    if data.num_classes is None or models.has_own_head(model):
        return
    source, own = model.recombine_source, model.own_classes
    what = f"model {source['name']} has no head of its own for data={data.name}"
    why = f"its weights tell {own} classes apart, not {data.num_classes}" if own else "its weights have none"
    fix = "train one with stage=adapt and give stage.checkpoint=FILE"
    if own == data.num_classes:  # of other classes, for all that is known
        why, fix = f"the one in its weights is of {own} classes too", f"+model.num_classes={own} takes it"
    elif data.uses_pretrained_classes and (tags := models.tags(source["arch"], data.num_classes)):
        fix = f"take model.tag={' or '.join(tags[:3])}"
    raise UsageError(f"{what} ({why}): {fix}")
