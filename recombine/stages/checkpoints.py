"""The model that a stage finds: the original one, or a checkpoint's."""

from recombine.core import checkpoint
from recombine.errors import UsageError
from recombine.models import roles
from recombine.stages.context import RunContext


def load_checkpoint(run: RunContext) -> str | None:
    """Puts the checkpoint that `stage.checkpoint` names in the place of the run's model; returns its path.

    Raises:
        UsageError: it does not fit the model, or the data.
    """
    path = run.settings.stage.checkpoint
    if path is None:
        run.model.requires_grad_(False)
        return None
    try:
        run.model = checkpoint.load(path, run.model)
    except UsageError as error:
        raise UsageError(f"stage.checkpoint={error}") from error
    if run.settings.quantize.bits is not None:  # nothing trains any more, and all is packed
        run.model.requires_grad_(False)
    if (classes := roles.classes(run.model)) not in (None, run.data.num_classes):
        why = f"tells {classes} classes apart, {run.data.task} has {run.data.num_classes}"
        raise UsageError(f"stage.checkpoint={path}: {why}; set data.task to the one it was trained on")
    return path
