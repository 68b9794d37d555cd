"""Compress under a budget and distil from the original model (CRISP Alg. 4), then train the classifier alone; or, for
`joint`, what the method trains as well."""

import copy

from torch import nn

from recombine.errors import UsageError
from recombine.layers import RecombinedLinear
from recombine.methods import train_only
from recombine.models import roles
from recombine.stages.adapt import fit, train_and_test
from recombine.stages.retrofit import rewrite, weight_errors
from recombine.stages.run import Run
from recombine.tasks import Distillation


def compress(run: Run) -> dict:
    """Compress and distil, then the classifier only."""
    added = distil(run)
    head = roles.head(run.model)
    train_only(run.model, {name for name, p in run.model.named_parameters() if any(p is q for q in head.parameters())})
    return added | train_and_test(run)


def joint(run: Run) -> dict:
    """Compress and distil, then adapt."""
    added = distil(run)
    train_only(run.model, run.model.recombined.trains)
    return added | train_and_test(run)


def distil(run: Run) -> dict:
    """Rewrites the model and lets it follow the original on the training images; labels are not used."""
    if not run.method.compresses:
        raise UsageError(
            f"stage={run.cfg.stage.name}: {type(run.method).__name__.lower()} does not compress; use svd or crisp"
        )
    teacher = copy.deepcopy(run.model)
    rewrite(run)
    errors = weight_errors(teacher, run.model)
    knobs = run.cfg.stage.distil
    if knobs.epochs:
        train_only(run.model, distilled(run.model))
        task = Distillation(teacher, knobs.kl, knobs.mse, knobs.features)
        _, best = fit(run, task, knobs, knobs.epochs, "distilled")
        return {"weight_error": errors, "distil": {"val_loss": best.value, "best_epoch": best.epoch}}
    return {"weight_error": errors}


def distilled(model: nn.Module) -> set[str]:
    """The factors, norms and biases: all that Alg. 4 trains."""
    factors = {id(p) for m in model.modules() if isinstance(m, RecombinedLinear) for p in m.parameters()}
    head = {id(p) for p in roles.head(model).parameters()}
    return {n for n, p in model.named_parameters() if id(p) in factors or p.ndim <= 1 and id(p) not in head}
