"""Score a checkpoint on the test set."""

from recombine import export
from recombine.errors import UsageError
from recombine.lit import LitRecombine
from recombine.stages.adapt import test
from recombine.stages.run import Run
from recombine.tasks import Classification


def evaluate(run: Run) -> dict:
    if not run.cfg.stage.checkpoint:
        raise UsageError(
            "stage.checkpoint=null: evaluate needs stage.checkpoint=FILE, which result.json of a run names"
        )
    run.model = export.load(run.cfg.stage.checkpoint, run.model)
    task = Classification(run.data.num_classes)
    return {"test": test(run, LitRecombine(run.model, run.method, task)), "checkpoint": run.cfg.stage.checkpoint}
