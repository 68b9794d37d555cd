"""Train what the method trains. Validation chooses the weights; the test set is read once, with those."""

import base64
import math
import sys

import lightning as L
import numpy as np
import torch
from torch import Tensor

from recombine.core import adapters, checkpoint
from recombine.core.method import Method
from recombine.core.twin import sharing
from recombine.data.base import DataModule
from recombine.errors import UsageError
from recombine.layers.packed import BITS
from recombine.result_schema import StagePart
from recombine.stages.context import RunContext
from recombine.stages.sample import drawn_scores
from recombine.stages.settings import RunSettings
from recombine.training import distributed, engine, finite, sharding
from recombine.training.callbacks import Bars, Curves, Epochs, KeepBest, Patience
from recombine.training.lit import LitRecombine
from recombine.training.objectives import Objective
from recombine.training.resume import TrainingState, loop_position
from recombine.training.settings import OptimizerSettings
from recombine.training.trainer import build_trainer, interruptible

LABELS = {"distilled": "distillation", "best": "training"}  # what `fit` makes -> what a user sees at work
KEYS = {"distilled": "stage.distil", "best": "optim"}  # -> where its optimizer stands in the configuration


def adapt(run: RunContext) -> StagePart:
    """Rewrite, then train what the method trains and the classifier."""
    run.checkpointed_step("rewritten", run.rewrite_all)
    part = train_and_test(run)
    if run.base is not None and distributed.rank() == 0:
        labels = getattr(run.data, "classes", None)
        adapters.save_adapter(run.model, run.out / "adapter.safetensors", labels)
    return part


def train_and_test(run: RunContext, whole: bool = False) -> StagePart:
    """The data's task with the run's optimizer, on the model as it stands.

    Args:
        whole: a model that nothing trains in is saved with all its weights, as it was not made from the pretrained one.
    """
    optim = run.settings.optim
    objective = run.objective(optim.label_smoothing)
    if not any(p.requires_grad for p in run.model.parameters()):  # compressed, without a head: there is nothing to fit
        path = run.out / "best.safetensors"
        if distributed.rank() == 0:
            if whole:
                checkpoint.save(run.model, path, whole=True)
            else:
                checkpoint.save_best(run.model, path)
        lit = LitRecombine(run.model, run.method, objective)
        return {"val": validate(run, lit)} | test(run, lit) | {"checkpoint": str(path)}
    lit, best = fit(run, objective, optim, run.settings.trainer.epochs, "best", run.method)
    val = {} if run.data.val is None else {objective.metric: best.value}
    return {"best_epoch": best.epoch, "val": val, "checkpoint": str(best.path)} | test(run, lit)


def fit(
    run: RunContext, objective: Objective, optim: OptimizerSettings, epochs: int, name: str, method: Method
) -> tuple[LitRecombine, KeepBest]:
    """Trains the parameters that require a gradient and leaves the model with the best weights by validation."""
    settings = run.settings.trainer
    slot = "compressor" if method is run.compressor else "method"
    lit = LitRecombine(run.model, method, objective, optim, run.settings.seed, KEYS[name], slot)
    monitor = f"val/{objective.metric}"
    best, history = KeepBest(monitor, objective.mode, run.out / f"{name}.safetensors"), Curves()
    state = TrainingState(run.state, name, settings.checkpoint_minutes)
    callbacks = [best, history, Epochs(LABELS[name]), *early_stopping(run, monitor, objective.mode), state]
    logger = run.logger and run.logger.fit(name)
    trainer = run_trainer(run, LABELS[name], epochs, callbacks, optim.clip, logger, settings.accumulate)
    resume_from = state.find()
    run.data.resume_at(*(loop_position(resume_from) if resume_from else (0, 0)))
    sharded = isinstance(trainer.strategy, sharding.Sharded)  # in place
    whole = sharing(run.model, buffers=True) if sharded else None
    with run.timed(f"train_{name}"), engine.engaged(run.model, settings), interruptible():
        trainer.fit(lit, run.data, ckpt_path=resume_from, weights_only=True)
    if whole is not None:
        best.restore(whole)
        run.model = lit.model = whole
        if distributed.rank() == 0:
            checkpoint.save_best(whole, best.path)
    run.seconds[f"train_{name}"] += round(state.before, 3)
    run.earlier += state.before
    run.curves[name] = history.curves
    if run.data.val is not None:
        finite.refuse_scores({name: {monitor: best.value}}, f"no epoch had a score; {lit.way_back()}")
    return lit, best


def require_trainable(settings: RunSettings, data: DataModule) -> None:
    """Refuses what a training will refuse, before those that come first have taken their hours.

    Raises:
        UsageError: patience without validation data, or shards with packed weights or with an optimizer that needs
            whole matrices.
    """
    trainer, stage = settings.trainer, settings.stage
    if stage.name not in ("adapt", "compress", "joint"):
        return
    if trainer.patience and data.val is None:
        raise UsageError(
            f"trainer.patience={trainer.patience}: without validation data nothing says when to stop; "
            "set trainer.patience=null, or data.select=val"
        )
    if sharding.asked(trainer.strategy):
        for key, optim in (("optim", settings.optim), ("stage.distil", getattr(stage, "distil", settings.optim))):
            sharding.require_entrywise(optim.name, key)
        trains = stage.name != "compress" or data.num_classes  # a fit follows once the weights are packed
        if settings.quantize.bits in BITS and trains and getattr(stage, "order", None) != "adapt_first":
            raise UsageError(f"quantize.bits={settings.quantize.bits}: {sharding.PACKED}")


def early_stopping(run: RunContext, monitor: str, mode: str) -> list[Patience]:
    """The callback that `trainer.patience` asks for, if it does."""
    patience = run.settings.trainer.patience
    return [Patience(monitor, mode=mode, patience=patience, check_finite=False)] if patience else []


def validate(run: RunContext, lit: LitRecombine) -> dict[str, float]:
    """The score on the validation set by which weights are chosen; empty without one."""
    if run.data.val is None:
        return {}
    with interruptible():
        (scores,) = run_trainer(run, "validation", 1, [], None).validate(lit, run.data, verbose=False)
    return {lit.objective.metric: scores[f"val/{lit.objective.metric}"]}


def test(run: RunContext, lit: LitRecombine) -> StagePart:
    """Scores the model on the test set, a language model also on the harness's tasks, one that draws by pictures."""
    device = run.device
    with run.timed("test"), engine.products(run.settings.trainer.matmul), interruptible():
        (scores,) = run_trainer(run, "test", 1, [], None).test(lit, run.data, verbose=False)
    run.model.to(device)  # Lightning leaves it on the CPU
    if not math.isfinite(scores["test/loss"]):
        raise lit.failure(f"test/loss={scores['test/loss']}", run.batch(run.data.test, [0]))
    scores = lit.objective.report({name.removeprefix("test/"): value for name, value in scores.items()})
    if run.data.objective == "denoising":
        scores |= drawn_scores(run)
    names = run.settings.harness.names(run.data.harness)
    part = {"test": scores | harness_scores(run, names) if names else scores}
    return part | ({"test_right": bits(lit.right)} if lit.right else {})


def bits(right: list[Tensor]) -> str:
    """Which test samples were told right, in the order of the test set: one bit each, in base64.

    Args:
        right: by batch this rank's samples, (B,) bool. Rank r has rows r, r + world, ... of a batch.
    """
    parts = distributed.gather([batch.cpu() for batch in right])
    whole = []
    for batch in zip(*parts, strict=True):
        rows = torch.zeros(sum(map(len, batch)), dtype=torch.bool)
        for rank, mine in enumerate(batch):
            rows[rank :: len(batch)] = mine
        whole.append(rows)
    return base64.b64encode(np.packbits(torch.cat(whole).numpy()).tobytes()).decode()


def harness_scores(run: RunContext, names: tuple[str, ...]) -> dict[str, float]:
    """Scores of lm-evaluation-harness on these tasks, and their mean. Of several ranks the first one scores."""
    from recombine.evaluation import harness  # lm-eval takes seconds to load

    scores = {}
    with run.timed("harness"):
        if distributed.rank() == 0:
            scores = harness.evaluate(
                run.model,
                run.data.tokenizer,
                names,
                limit=run.settings.harness.limit,
                batch_size=run.data.batch_size,
                root=run.data.root,
            )
        distributed.wait()
    if accuracies := [value for key, value in scores.items() if key.endswith(("/acc", "/exact_match"))]:
        scores["tasks_mean"] = sum(accuracies) / len(accuracies)
    return scores


def run_trainer(
    run: RunContext, what: str, epochs: int, callbacks: list, clip: float | None, logger=None, accumulate: int = 1
) -> L.Trainer:
    """A Trainer for this run's model and data. what: the name of the work on its bar."""
    shown = run.settings.trainer.progress and sys.stderr.isatty()
    return build_trainer(
        run.settings.trainer,
        max_epochs=epochs,
        gradient_clip_val=clip,
        accumulate_grad_batches=accumulate,
        callbacks=[*callbacks, Bars(what)] if shown else callbacks,
        logger=logger or False,
        enable_checkpointing=any(isinstance(callback, TrainingState) for callback in callbacks),
        enable_progress_bar=shown,
        limit_val_batches=0 if run.data.val is None else 1.0,
        default_root_dir=run.out,
    )
