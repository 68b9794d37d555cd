"""Train what the method trains. Validation chooses the weights; the test set is read once, with those."""

import copy

import lightning as L
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig

from recombine.core import checkpoint
from recombine.errors import UsageError
from recombine.methods import Method
from recombine.stages.context import Run
from recombine.stages.retrofit import rewrite_all
from recombine.training import distributed
from recombine.training.curves import Curves
from recombine.training.epochs import Epochs
from recombine.training.lit import KeepBest, LitRecombine
from recombine.training.objectives import Task
from recombine.training.resume import TrainingState, where


def adapt(run: Run) -> dict:
    run.phase("rewritten", lambda: rewrite_all(run))
    if not run.method.advance(run.model, 0.0):
        name = type(run.method).__name__.lower()
        raise UsageError(f"stage=adapt: {name} takes its form in a distillation; set stage=joint or stage=compress")
    return train_and_test(run)


def train_and_test(run: Run) -> dict:
    """The data's task with the run's optimizer, on the model as it stands."""
    optim, task = run.cfg.optim, run.task(run.cfg.optim.label_smoothing)
    if not any(p.requires_grad for p in run.model.parameters()):  # compressed, without a head: there is nothing to fit
        lit = LitRecombine(run.model, run.method, task)
        path = run.out / "best.safetensors"
        if distributed.rank() == 0:
            checkpoint.save(run.model, path)
        return {"test": test(run, lit), "checkpoint": str(path)}
    lit, best = fit(run, task, optim, run.cfg.trainer.epochs, "best", run.method)
    val = {} if run.data.val is None else {task.metric: best.value}
    return {"best_epoch": best.epoch, "val": val, "test": test(run, lit), "checkpoint": str(best.path)}


def fit(
    run: Run, task: Task, optim: DictConfig, epochs: int, name: str, method: Method
) -> tuple[LitRecombine, KeepBest]:
    """Trains the parameters that require a gradient and leaves the model with the best weights by validation."""
    knobs = {key: optim[key] for key in ("lr_head", "weight_decay", "warmup", "schedule")}
    lr = method.lr if optim.lr is None else optim.lr
    knobs["optimizer"] = optim.get("name", "adamw")  # a distillation has no such key
    lit = LitRecombine(run.model, method, task, lr=lr, seed=run.cfg.seed, **knobs)
    monitor = f"val/{task.metric}"
    callbacks = [best := KeepBest(monitor, task.mode, run.out / f"{name}.safetensors"), history := Curves()]
    callbacks.append(Epochs(name))
    if run.cfg.trainer.patience and run.data.val is None:
        raise UsageError(
            f"trainer.patience={run.cfg.trainer.patience}: without validation data nothing says when to stop; "
            "set trainer.patience=null, or data.select=val"
        )
    if run.cfg.trainer.patience:
        patience = run.cfg.trainer.patience
        callbacks.append(EarlyStopping(monitor, mode=task.mode, patience=patience, check_finite=False))
    callbacks.append(state := TrainingState(run.state, name, run.cfg.trainer.checkpoint_minutes))
    trainer = make_trainer(run, epochs, callbacks, optim.clip, run.logger and run.logger.fit(name))
    found = state.find()
    run.data.start = where(found) if found else (0, 0)
    whole = copy.deepcopy(run.model) if isinstance(trainer.strategy, FSDPStrategy) else None  # it wraps in place
    with run.timed(f"train_{name}"):
        trainer.fit(lit, run.data, ckpt_path=found, weights_only=True)
    if whole is not None:
        best.weights = trainer.strategy.broadcast(best.weights)
        best.put(whole)
        run.model = lit.model = whole
        if distributed.rank() == 0:
            checkpoint.save(whole, best.path)
    run.seconds[f"train_{name}"] += round(state.before, 3)
    run.curves[name] = history.curves
    return lit, best


def test(run: Run, lit: LitRecombine) -> dict[str, float]:
    """Scores the model on the test set, and a language model on the harness's tasks that go with the data."""
    with run.timed("test"):
        (scores,) = make_trainer(run, 1, [], None).test(lit, run.data, verbose=False)
    scores = lit.task.report({name.removeprefix("test/"): value for name, value in scores.items()})
    if names := run.cfg.harness.tasks or getattr(run.data, "harness", ()):
        from recombine.evaluation import harness  # lm-eval takes seconds to load

        knobs = {
            "limit": run.cfg.harness.limit,
            "batch_size": run.data.batch_size,
            "root": getattr(run.data, "root", None),
        }
        with run.timed("harness"):
            if distributed.rank() == 0:
                scores |= harness.evaluate(run.model, run.data.tokenizer, names, **knobs)
            distributed.wait()
        if found := [value for key, value in scores.items() if key.endswith(("/acc", "/exact_match"))]:
            scores["tasks_mean"] = sum(found) / len(found)
    return scores


def make_trainer(run: Run, epochs: int, callbacks: list, clip: float | None, logger=None) -> L.Trainer:
    return trainer_on(
        run.cfg.trainer,
        max_epochs=epochs,
        gradient_clip_val=clip,
        callbacks=callbacks,
        logger=logger or False,
        enable_checkpointing=any(isinstance(callback, TrainingState) for callback in callbacks),
        enable_progress_bar=run.cfg.trainer.progress,
        limit_val_batches=0 if run.data.val is None else 1.0,
        default_root_dir=run.out,
    )


def trainer_on(trainer: DictConfig, **knobs) -> L.Trainer:
    """A Trainer on the devices that the configuration names."""
    try:
        return L.Trainer(
            accelerator=trainer.accelerator,
            devices=trainer.devices,
            num_nodes=trainer.num_nodes,
            strategy=trainer.strategy if isinstance(trainer.strategy, str) else instantiate(trainer.strategy),
            precision=precision(trainer.precision, trainer.accelerator),
            plugins=distributed.cluster(),
            use_distributed_sampler=False,  # recombine/data/batch_sampler.py divides, and pads nothing
            enable_model_summary=False,
            num_sanity_val_steps=0,
            log_every_n_steps=1,
            **knobs,
        )
    except (MisconfigurationException, RuntimeError, TypeError, ValueError) as error:
        raise UsageError(f"trainer: {' '.join(str(error).split())}; correct that key of trainer") from error


def precision(wanted: str, accelerator: str) -> str:
    """auto: bf16 where the GPU has it, fp16 on older ones, float32 on a CPU."""
    known = ("auto", "32-true", "bf16-mixed", "16-mixed")
    if wanted not in known:
        raise UsageError(f"trainer.precision={wanted}: must be one of {', '.join(known)}")
    if wanted != "auto":
        return wanted
    if accelerator == "cpu" or not torch.cuda.is_available():
        return "32-true"
    return "bf16-mixed" if torch.cuda.is_bf16_supported() else "16-mixed"
