"""Compress under a budget and distil from the original model (CRISP Alg. 4), then train the classifier alone; or, for
`joint`, what the method trains as well."""

import copy

from torch import nn

from recombine import methods
from recombine.errors import UsageError
from recombine.methods import train_only
from recombine.models import roles
from recombine.result_schema import StagePart
from recombine.stages.adapt import fit, train_and_test
from recombine.stages.context import Run
from recombine.stages.retrofit import compressor, rewrite, weight_errors
from recombine.training.objectives import Distillation


def compress(run: Run) -> StagePart:
    """Compress and distil, then the classifier only."""
    added, _ = distil(run)
    head = [] if (found := roles.head(run.model)) is None else list(found.parameters())
    train_only(run.model, {name for name, p in run.model.named_parameters() if any(p is q for q in head)})
    return added | train_and_test(run)


def joint(run: Run) -> StagePart:
    """Compress and distil, then adapt."""
    added, original = distil(run)
    if run.compressor is not None:
        run.phase("adapted", lambda: rewrite(run, run.method), base=original)
    train_only(run.model, run.model.recombined.trains)
    return added | train_and_test(run)


def distil(run: Run) -> tuple[StagePart, nn.Module]:
    """Rewrites the model and lets it follow the original, which comes back too, on the training data without labels."""
    method = compressor(run)
    if not method.compresses:
        raise UsageError(
            f"stage={run.cfg.stage.name}: {type(method).__name__.lower()} does not compress; use svd or crisp, "
            "or put a compressor before it: method@compressor=svd"
        )
    teacher = copy.deepcopy(run.model)
    run.phase("rewritten", lambda: rewrite(run, method))
    added = {"weight_error": weight_errors(teacher, run.model)}
    knobs = run.cfg.stage.distil
    if knobs.epochs:
        train_only(run.model, method.distils(run.model))
        task = Distillation(teacher, knobs.kl, knobs.mse, knobs.features)
        _, best = fit(run, task, knobs, knobs.epochs, "distilled", method)
        added["distil"] = {"val_loss": None if run.data.val is None else best.value, "best_epoch": best.epoch}
        added["distil"]["curves"] = run.curves["distilled"]
    method.advance(run.model, 1.0)
    methods.finish(run.model, method, alone=run.compressor is None)
    return added, teacher
