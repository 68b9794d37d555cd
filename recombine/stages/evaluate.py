"""Score a checkpoint on the test set."""

from recombine import export
from recombine.errors import UsageError
from recombine.lit import LitRecombine
from recombine.models import roles
from recombine.stages.adapt import test
from recombine.stages.run import Run


def evaluate(run: Run) -> dict:
    run.model = export.load(run.cfg.stage.checkpoint, run.model)
    head = roles.head(run.model)
    if head is not None and (classes := head.out_features) != run.data.num_classes:
        why = f"tells {classes} classes apart, {run.data.task} has {run.data.num_classes}"
        raise UsageError(f"{run.cfg.stage.checkpoint}: {why}; set data.task to the one it was trained on")
    return {"test": test(run, LitRecombine(run.model, run.method, run.task())), "checkpoint": run.cfg.stage.checkpoint}
