"""One run, from its RunSpec to result.json; and the suites, which are several runs."""

import time
from contextlib import nullcontext
from pathlib import Path

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict
from torch import nn

from recombine import data, models, results
from recombine.core.method import Method
from recombine.core.rewrite import find_sites
from recombine.data.base import DataModule
from recombine.errors import UsageError
from recombine.evaluation import harness, linear_probe
from recombine.models import roles
from recombine.models.sizes import require_image_size
from recombine.models.weights import origin
from recombine.runner import effects, exports, folder, limits, plan
from recombine.runner.assemble import assemble_result
from recombine.runner.base import fresh_head, put_on_base
from recombine.runner.config import RunSpec, resolve
from recombine.runner.idle import idle
from recombine.runner.other_data import build_calibration_data, build_transfer_data
from recombine.runner.summary import suite_table, summary_table
from recombine.runtime import progress
from recombine.runtime.digest import remembered_digest
from recombine.stages import STAGES, analysis, mix
from recombine.stages.adapt import require_trainable
from recombine.stages.compress import require_small_fields
from recombine.stages.context import RunContext
from recombine.stages.evaluate import require_head
from recombine.stages.sample import require_prompts
from recombine.training import distributed, finite, loggers, resume

SCORED = ("val", "test", "linear_probe", "distil", "weight_error", "logit_error", "logit_scale", "elsewhere")


def run_suite(cfg: DictConfig, out: Path) -> float:
    """Runs every task of the suite, one after the other, and writes suite.json with the means of the groups.

    Returns:
        The mean validation score.

    Raises:
        UsageError: the data has no suite, or the stage scores none.
    """
    if cfg.stage.name not in ("adapt", "compress", "joint"):
        raise UsageError(f"data.task=all: stage={cfg.stage.name} scores no suite; use adapt, compress or joint")
    groups = data.suite(cfg.data.name)
    if not groups:
        raise UsageError(f"data.task=all: data={cfg.data.name} has no suite; name one task")
    scores: dict[str, dict[str, float]] = {}
    done = []
    for task, group in groups.items():
        with open_dict(cfg):
            cfg.data.task = task
        result = run_task(cfg, out / task)
        score = result["test"][result["metric"]]
        scores.setdefault(group, {})[task] = float("nan") if score is None else score
        done.append(result)
        summary = {"groups": {g: sum(s.values()) / len(s) for g, s in scores.items()}, "tasks": scores}
        summary["mean"] = sum(summary["groups"].values()) / len(summary["groups"])  # as NOAH's
        everything = [score for tasks in scores.values() for score in tasks.values()]
        summary["mean_of_tasks"] = sum(everything) / len(everything)  # as CRISP's, Tab. 1
        if distributed.rank() == 0:
            results.write(out / "suite.json", summary | {"complete": len(done) == len(groups)})
    if distributed.rank() == 0:
        print("\n" + suite_table(summary, done[-1], out / "suite.json"))
    return sum(map(results.score, done)) / len(done)


def run_task(cfg: DictConfig, out: Path) -> dict:
    """One run, and its result. What is there already is not computed again."""
    spec = resolve(cfg)
    path = out / "result.json"
    typed = HydraConfig.get().overrides.task if HydraConfig.initialized() else ()
    if (result := results.load_finished(out, spec.config, typed)) is not None:
        print(f"{path}: finished before\n{summary_table(result, path)}")
        if distributed.rank() == 0:
            exports.make_up(spec.export, out, result)
        return result
    limits.require_accelerator(spec.settings.trainer.accelerator)
    limits.require_workers(spec.data.get("num_workers", 0))
    plan.at_start(spec)
    with results.lock_folder(out) if distributed.rank() == 0 else nullcontext():
        if path.is_file():  # of a process that ended here since
            raise UsageError(f"{path}: another process has just written it; start again, or name another folder")
        folder.keep_configuration(cfg, out)
        return execute(spec, out)


def execute(spec: RunSpec, out: Path) -> dict:
    """Does one run: model, data, linear probe, stage, analyses, result.json."""
    start = time.perf_counter()
    L.seed_everything(spec.settings.seed, verbose=False)
    with progress.display(spec.settings.trainer.progress):
        run = set_up(spec, out)
        if HydraConfig.initialized() and distributed.rank() == 0:  # not before: what cannot run is one line alone
            effects.say_unread(spec.config, HydraConfig.get(), idle(spec, run.data))
        run.seconds["setup"] = round(time.perf_counter() - start, 3)
        with loggers.open_logger(spec.logger, watched(spec, run)) as run.logger:
            fit_head(run)
            mix.settle(run)
            original = analysis.before(run)
            added = STAGES[spec.settings.stage.name](run)
            result = assemble_result(spec, run, added, analysis.after(run, original))
            result["seconds"]["total"] = round(run.earlier + time.perf_counter() - start, 3)
            if distributed.rank() == 0:
                report(result, run)
                exports.write(spec.export, run.model, run.out, result)
    return result


def report(result: dict, run: RunContext) -> None:
    """Prints the result, writes it, and shows it to the logger; then there is nothing left to go on from."""
    path = run.out / "result.json"
    scored = {key: value for key, value in result.items() if key in SCORED}
    finite.refuse_scores(scored, "look at the data, the rates and the precision")
    print("\n" + summary_table(result, path), flush=True)  # first: a full disk must not eat it
    results.write(path, result)
    resume.clear(run.out)
    if run.logger:
        run.logger.report(result)


def set_up(spec: RunSpec, out: Path) -> RunContext:
    """The model and the data of a run. What cannot work is refused before anything is downloaded or made."""
    module = data.build(**spec.data)
    require_harness(spec, module)
    require_prompts(module, spec.settings)
    native = {"num_classes": module.num_classes} if module.uses_pretrained_classes else {}  # may keep its own head
    model = models.build(**native | models.for_task(spec.model, module.task_of_model))
    exports.require_possible(spec.export, model, spec.settings.quantize.bits)
    source, stage = model.recombine_source, spec.settings.stage
    module.attach_model(**models.for_data(source))
    require_image_size(model, getattr(module, "image_size", None))
    scored_as_it_is = stage.name == "evaluate" and stage.checkpoint is None or getattr(stage, "test", False)
    if scored_as_it_is and (spec.settings.optim.head != "probe" or stage.name == "evaluate"):
        require_head(model, module)
    method, continued = start(spec, model)
    if stage.name in ("compress", "joint") and stage.distil.epochs and spec.settings.quantize.bits is None:
        require_small_fields(model, spec.compressor or spec.method, spec.budget, stage.name)
    calibration = build_calibration_data(spec, module, source)
    transfer = build_transfer_data(spec, module, source)
    for part in filter(None, (module, calibration, *transfer.values())):
        part.prepare_data()
        part.setup()
    limits.require_batch(module)
    require_trainable(spec.settings, module)
    if module.num_classes and spec.base is not None:
        fresh_head(model, module.num_classes)
    elif module.num_classes and roles.classes(model) != module.num_classes:  # +model.num_classes keeps one
        models.reset_head(model, module.num_classes)
    if torch.cuda.is_available() and spec.settings.trainer.accelerator in ("auto", "gpu", "cuda"):
        model.cuda()
    for part in filter(None, (module, calibration)):
        part.ask(model)
    read = named_weights(spec, model)
    state = resume.state_folder(out, spec.config, read)
    pieces = {
        "compressor": spec.compressor,
        "calibration_data": calibration,
        "transfer_data": transfer,
        "base": spec.base,
        "continued": continued,
        "labels": spec.labels,
        "original": repr((spec.model, read, spec.data, next(model.parameters()).device)),
    }
    run = RunContext(spec.settings, out, state, model, method, spec.budget, module, **pieces)
    if spec.settings.calibration.sha256 is not None:
        run.calibration_sha256()
    return run


def named_weights(spec: RunSpec, model: nn.Module) -> dict[str, str]:
    """The sha256 of the files of weights that the user named, by the file's name, or "base"."""
    found = {} if spec.model.get("checkpoint") is None else origin(model.recombine_weights)["sha256"]
    return found if spec.base is None else found | {"base": remembered_digest(spec.base)}


def start(spec: RunSpec, model: nn.Module) -> tuple[Method, bool]:
    """Puts a run's model on its base, where it has one; checks that the methods find their layers.

    Returns:
        The method that adapts, and whether it is the one that made the base.
    """
    if spec.base is not None:
        return put_on_base(spec.base, model, spec.method, spec.budget)
    for method in filter(None, (spec.compressor, spec.method)):
        if spec.settings.stage.name not in ("evaluate", "sample"):
            find_sites(model, method)
    return spec.method, False


def require_harness(spec: RunSpec, module: DataModule) -> None:
    """Refuses tasks that there are not; those that the run will score have their data before anything is trained."""
    tasks, stage = spec.settings.harness.tasks, spec.settings.stage
    if tasks is not None and module.objective != "lm":
        why = f"data={module.name} is for no language model, which is what the harness scores"
        raise UsageError(f"harness.tasks={[*tasks]}: {why}; set harness.tasks=null")
    harness.require_known(tasks or (), module.root)
    scores = stage.name in ("adapt", "compress", "joint", "evaluate") or getattr(stage, "test", False)
    if scores and module.objective == "lm" and distributed.rank() == 0:
        harness.fetch(spec.settings.harness.names(module.harness), module.root)


def fit_head(run: RunContext) -> None:
    """Fits the linear probe, which the result reports, and starts the head from it where it has to."""
    stage, head = run.settings.stage.name, roles.head(run.model)
    if head is None or run.data.num_classes is None or stage == "evaluate" or models.has_own_head(run.model):
        return
    fitted, test, starts = linear_probe.asked(run.settings, (run.compressor, run.method))
    if fitted:
        with run.timed("probe"):
            path = run.state / "probe.safetensors"
            run.probe = linear_probe.load_or_fit(path, run.model, run.data, test, run.original)
            if starts:
                run.probe.init_head(roles.output_layer(run.model))


def watched(spec: RunSpec, run: RunContext) -> loggers.Watched:
    """What the logger is told of the run."""
    labels = run.labels | {"model": spec.model["name"], "task": run.data.task or run.data.name}
    labels |= {} if run.budget.kind == "none" else {"budget": str(run.budget)}
    out = run.out
    return loggers.Watched(out, folder.name(out), folder.group(out), spec.settings.stage.name, spec.config, labels)
