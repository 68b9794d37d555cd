"""From a composed configuration to a run, and from a run to result.json."""

import copy
import logging
import time
import warnings
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from recombine import data, methods, models, results
from recombine.core import method as core_method
from recombine.core.budget import Budget, count, layer_report
from recombine.core.calibration import BACKWARD
from recombine.data.vision.base import VisionData
from recombine.errors import UsageError
from recombine.evaluation import linear_probe
from recombine.models import roles
from recombine.runtime import conf, progress
from recombine.stages import STAGES, Run, analysis
from recombine.stages.adapt import trainer_on
from recombine.stages.evaluate import needs_head
from recombine.training import distributed, loggers, resume
from recombine.training.lit import OPTIMIZERS


def method(cfg: DictConfig) -> methods.Method:
    """The method that cfg describes. A wrong type or an unknown field is refused in one line."""
    cls = get_class(cfg._target_)
    fields = {key: value for key, value in cfg.items() if key != "_target_"}
    try:
        merged = OmegaConf.merge(OmegaConf.structured(cls), fields)
        values = OmegaConf.to_container(merged)
    except OmegaConfBaseException as error:
        key = error.full_key or error.key
        known = ", ".join(OmegaConf.structured(cls))
        reason = str(error).splitlines()[0]
        given = fields.get(str(key).split(".")[0], "")
        raise UsageError(f"method.{key}={given}: {reason}; {cls.__name__} takes {known}") from error
    return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


def task(cfg: DictConfig) -> float:
    """What Hydra runs, once for each configuration."""
    return main(cfg, Path(HydraConfig.get().runtime.output_dir))


def main(cfg: DictConfig, out: Path) -> float:
    """Runs the stage on one task, or on a suite of them, and returns the (mean) validation score."""
    quiet()
    if (cfg.trainer.devices, cfg.trainer.num_nodes, cfg.trainer.strategy) != (1, 1, "auto"):
        trainer = trainer_on(cfg.trainer, logger=False, enable_checkpointing=False)
        if count := distributed.to_start(trainer):
            return distributed.launch(cfg, out, count)
        distributed.join(trainer)
    with distributed.together(out):
        return suite(cfg, out) if cfg.data.task == "all" else results.score(one(cfg, out))


def suite(cfg: DictConfig, out: Path) -> float:
    """Every task of the suite, one after the other; group means as VTAB papers print them."""
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
        result = one(cfg, out / task)
        score = result["test"][result["metric"]]
        scores.setdefault(group, {})[task] = float("nan") if score is None else score
        done.append(result)
        summary = {"groups": {g: sum(s.values()) / len(s) for g, s in scores.items()}, "tasks": scores}
        summary["mean"] = sum(summary["groups"].values()) / len(summary["groups"])  # as NOAH's
        everything = [score for tasks in scores.values() for score in tasks.values()]
        summary["mean_of_tasks"] = sum(everything) / len(everything)  # as CRISP's, Tab. 1
        if distributed.rank() == 0:
            results.write(out / "suite.json", summary | {"complete": len(done) == len(groups)})
    rows = [(f"{g}: {t}", f"{100 * v:.1f}") for g, tasks in scores.items() for t, v in tasks.items()]
    rows += [(f"mean of {g}", f"{100 * v:.1f}") for g, v in summary["groups"].items()]
    rows += [("mean of the groups", f"{100 * summary['mean']:.1f}")]
    rows += [("mean of the tasks", f"{100 * summary['mean_of_tasks']:.1f}"), ("result", out / "suite.json")]
    if distributed.rank() == 0:
        print("\n" + results.table(rows))
    return sum(map(results.score, done)) / len(done)


def one(cfg: DictConfig, out: Path) -> dict:
    """One run: model, data, probe, stage, account, result.json. What is there already is not computed again."""
    check(cfg)
    if (result := results.finished(out, cfg)) is not None:
        print(f"{out / 'result.json'}: finished before\n{results.table(rows(result, out / 'result.json'))}")
        return result
    with results.reserved(out) if distributed.rank() == 0 else nullcontext():
        return run(cfg, out)


def run(cfg: DictConfig, out: Path) -> dict:
    start = time.perf_counter()
    L.seed_everything(cfg.seed, verbose=False)
    progress.shown = cfg.trainer.progress
    chosen, first = pair(cfg)
    budget = Budget.parse(cfg.budget)
    module = data.build(**OmegaConf.to_container(cfg.data, resolve=True, throw_on_missing=True), seed=cfg.seed)
    native = {"num_classes": module.num_classes} if getattr(module, "native", False) else {}  # may keep its own head
    model = models.build(**native | OmegaConf.to_container(cfg.model, resolve=True))
    match(module, model.recombine_source)
    if OmegaConf.select(cfg, "stage.checkpoint") is None and (cfg.stage.name == "evaluate" or cfg.stage.get("test")):
        needs_head(model, module)
    for part in (first, chosen):  # bad fields are refused before the data is made
        if part is not None and cfg.stage.name != "evaluate":
            core_method.find_sites(copy.deepcopy(model), part)
    other = calibrates(cfg, module, model.recombine_source)
    others = elsewhere(cfg, module, model.recombine_source)
    for part in filter(None, (module, other, *others.values())):
        part.prepare_data()
        part.setup()
    head = roles.head(model)
    if module.num_classes and (head is None or head.out_features != module.num_classes):  # +model.num_classes keeps one
        models.reset_head(model, module.num_classes)
    if torch.cuda.is_available() and cfg.trainer.accelerator in ("auto", "gpu", "cuda"):
        model.cuda()
    run = Run(cfg, out, model, chosen, budget, module, first, other, others)
    run.seconds["setup"] = round(time.perf_counter() - start, 3)
    with loggers.watching(run):
        fit_head(run)
        original = analysis.before(run)
        added = STAGES[cfg.stage.name](run)
        result = describe(run, added | analysis.after(run, original))
        result["seconds"]["total"] = round(time.perf_counter() - start, 3)
        if distributed.rank() > 0:
            return result
        print("\n" + results.table(rows(result, out / "result.json")), flush=True)  # first: a full disk must not eat it
        results.write(out / "result.json", result)
        resume.clear(out)
        if run.logger:
            run.logger.report(result)
    return result


def match(module: L.LightningDataModule, source: dict) -> None:
    """Gives the data what belongs to the model: the size and statistics of pictures, or the tokenizer."""
    if not isinstance(module, VisionData):
        module.tokenizer = models.tokenizer(source)
        if (module.objective == "lm") != (source["arch"] == "llama"):
            fix = "model=smollm2_135m" if module.objective == "lm" else "model=minilm"
            raise UsageError(f"data={module.name} is no task for model {source['name']}: take {fix}, or other data")
    elif "image_size" not in source:
        other = "text" if source["arch"] == "llama" else "sentences"
        raise UsageError(f"data={module.name} is pictures, model {source['name']} reads text: take data={other}")
    else:
        module.image_size = module.image_size or source["image_size"]
        module.mean, module.std = module.mean or source["mean"], module.std or source["std"]


def calibrates(cfg: DictConfig, module: L.LightningDataModule, source: dict) -> L.LightningDataModule | None:
    """The data that calibrates in the place of the run's own; None: there is no other."""
    chosen = cfg.calibration.data
    chosen = {"name": chosen} if not OmegaConf.is_dict(chosen) else OmegaConf.to_container(chosen, resolve=True)
    if (name := chosen.get("name")) is None:
        return None
    known = conf.load("data", name) or {}
    other = data.build(**known | chosen, seed=cfg.seed)
    if {getattr(part, "objective", None) for part in (module, other)} != {"lm"}:
        raise UsageError(
            f"calibration.data={name}: a loss on it says nothing of data={module.name}; only language models calibrate "
            "on other text than their own, so set calibration.data.name=null"
        )
    match(other, source)
    return other


def elsewhere(cfg: DictConfig, module: L.LightningDataModule, source: dict) -> dict[str, L.LightningDataModule]:
    """The tasks of `analyse.elsewhere` other than the run's own, as its data gives them."""
    asked = OmegaConf.to_container(cfg.data, resolve=True)
    found = {t: data.build(**asked | {"task": t}, seed=cfg.seed) for t in cfg.analyse.elsewhere if t != module.task}
    for task, one in found.items():
        if not one.num_classes:
            raise UsageError(f"analyse.elsewhere={task}: data={module.name} has no classes to probe; set it to []")
        match(one, source)
    return found


def pair(cfg: DictConfig) -> tuple[methods.Method, methods.Method | None]:
    """(the method, the compressor that comes before it or None); a method after itself trains its own factors."""
    chosen = method(cfg.method)
    if cfg.get("compressor") is None:
        return chosen, None
    first = method(cfg.compressor)
    if not first.compresses:
        raise UsageError(f"method@compressor: {type(first).__name__.lower()} does not compress; choose one that does")
    if cfg.stage.name == "compress":
        raise UsageError("stage=compress applies the compressor alone: name it as method=, or take stage=joint")
    if type(first) is type(chosen):
        bare = [replace(part, lr=0.0, targets=()) for part in (chosen, first, type(chosen)())]
        if bare[0] not in bare[1:]:
            name = type(chosen).__name__.lower()
            raise UsageError(
                f"method={name} after itself trains the compressor's factors: set its fields as compressor.*"
            )
        return replace(first, lr=chosen.lr), None
    return chosen, first


def fit_head(run: Run) -> None:
    """The linear probe: a row of the result, and where the head starts if the original model has to teach or to give
    gradients."""
    stage, head = run.cfg.stage.name, roles.head(run.model)
    if head is None or run.data.num_classes is None or stage == "evaluate" or models.has_own_head(run.model):
        return
    judged = any(part.judges or part.wants() & BACKWARD for part in filter(None, (run.compressor, run.method)))
    starts = stage in ("compress", "joint") or judged or run.cfg.optim.head == "probe"
    if starts or (run.cfg.probe and stage not in ("retrofit", "profile")):
        with run.timed("probe"):
            run.probe = linear_probe.kept(run.state / "probe.safetensors", run.model, run.data)
            if starts:
                run.probe.into(head)


def check(cfg: DictConfig) -> None:
    """Refuses settings that would fail, or mislead, only after minutes of work."""

    def need(key: str, ok, why: str) -> None:
        value = OmegaConf.select(cfg, key)
        if not ok(value):
            raise UsageError(f"{key}={value}: must be {why}")

    number = lambda x: isinstance(x, int | float) and x >= 0  # noqa: E731
    whole = lambda x: isinstance(x, int) and x >= 1  # noqa: E731
    need("seed", lambda x: isinstance(x, int) and 0 <= x < 2**32, "a whole number from 0 to 2^32 - 1")
    if "distil" in cfg.stage:
        need("stage.distil.epochs", lambda x: isinstance(x, int) and x >= 0, "a whole number from 0")
    Budget.parse(cfg.budget)
    need("stage.name", lambda x: x in STAGES, f"one of {', '.join(STAGES)}")
    need("optim.name", lambda x: x in OPTIMIZERS, f"one of {', '.join(OPTIMIZERS)}")
    need("optim.head", lambda x: x in ("random", "probe"), "random or probe")
    need("optim.lr", lambda x: x is None or number(x), "a number from 0, or null for the method's own")
    for key in ("lr_head", "weight_decay", "warmup", "label_smoothing"):
        need(f"optim.{key}", number, "a number from 0")
    need("harness.limit", lambda x: x is None or whole(x), "a whole number from 1, or null for all documents")
    for key in ("samples", "batch_size"):
        need(f"calibration.{key}", whole, "a whole number from 1")
    share = lambda x: x is None or isinstance(x, int | float) and 0 < x <= 1  # noqa: E731
    need("analyse.subspaces", share, "a share of the energy in (0, 1], or null")
    need("analyse.maps", lambda x: x is None or whole(x), "a whole number from 1, or null")
    need("trainer.epochs", whole, "a whole number from 1")
    need("trainer.patience", lambda x: x is None or whole(x), "a whole number from 1, or null")
    if "bits" in cfg.stage:
        why = "a whole number from 2 to 16, or null for weights as they are"
        need("stage.bits", lambda x: x is None or isinstance(x, int) and 2 <= x <= 16, why)
    if cfg.stage.name == "evaluate":
        why = "the file of a checkpoint, which result.json of a run names, or null for the original model"
        need("stage.checkpoint", lambda x: x is None or Path(x).is_file(), f"{why} (no such file)")


def describe(run: Run, added: dict) -> dict:
    """Everything that a table, a plot or a doubter may ask of a run."""
    recombined = getattr(run.model, "recombined", None)
    hydra = HydraConfig.get() if HydraConfig.initialized() else None
    overrides = list(hydra.overrides.task) if hydra else []
    overrides = [f"data.task={run.data.task}" if o == "data.task=all" else o for o in overrides]
    return {
        "command": " ".join(["python run.py", *(f"'{o}'" if set(o) & set("[]{}() *") else o for o in overrides)]),
        "stage": run.cfg.stage.name,
        "model": run.model.recombine_source,
        "method": {"name": recombined.steps[-1].method, **recombined.steps[-1].fields} if recombined else None,
        "compressor": {"name": recombined.steps[0].method, **recombined.steps[0].fields}
        if recombined and len(recombined.steps) > 1
        else None,
        "budget": str(run.budget),
        "data": run.data.info,
        "calibration": None if run.calibration is None else run.calibration.info,
        "seed": run.cfg.seed,
        "metric": run.task().metric,
        "val": {},
        "test": {},
        "linear_probe": None if run.probe is None else {k: getattr(run.probe, k) for k in ("val", "test", "decay")},
        "account": count(run.model, run.sample()).as_dict(),
        "layers": layer_report(run.model) if recombined else [],
        "curves": run.curves.get("best", {}),
        **added,
        "seconds": run.seconds,
        "config": results.settings(run.cfg),
        "environment": results.environment(),
    }


def rows(result: dict, path: Path) -> list[tuple[str, str]]:
    """The table that a run ends with."""
    account, test, linear = result["account"], result["test"], result["linear_probe"]
    named = " + ".join(part["name"].lower() for part in (result["compressor"], result["method"]) if part) or "original"
    table = [
        (
            f"{named} on {result['data']['task']}",
            f"stage {result['stage']}, seed {result['seed']}",
        )
    ]
    if test:
        shown = {key: value for key, value in test.items() if "stderr" not in key}
        shown = {key: float("nan") if value is None else value for key, value in shown.items()}
        scores = [f"{k} {v:.3g}" if k in ("loss", "ppl") else f"{k} {100 * v:.1f} %" for k, v in shown.items()]
        table.append(("test", ", ".join(scores)))
    if linear:
        table.append(("linear probe, same data", f"{100 * linear['test']:.1f} %"))
    if errors := result.get("weight_error"):
        worst = max(errors, key=errors.get)
        mean = sum(errors.values()) / len(errors)
        table.append(("relative weight error", f"mean {mean:.2g}, worst {errors[worst]:.2g} ({worst})"))
    if "logit_error" in result:
        table.append(("logit error", f"{result['logit_error']:.2g} of {result['logit_scale']:.3g}"))
    if speed := result.get("profile"):
        for kind in ("train", "infer"):
            if speed["ratio"][kind] is not None:
                times = f"{speed['ratio'][kind]:.2f} times the reference"
                table.append((kind, f"{speed[f'{kind}_samples_s']:.1f} samples a second, {times}"))
    mib = {key: account[f"bytes_{key}"] / 2**20 for key in ("weights", "gradients", "optimizer")}
    memory = " + ".join(f"{key} {value:.1f}" for key, value in mib.items())
    trained, stored = account["trained"], account["stored"]
    table += [
        ("trained", f"{trained:,} parameters ({account['trained_without_head']:,} without the head)"),
        ("stored", f"{stored:,} parameters ({account['stored_without_head']:,} without the head)"),
        (
            "retained",
            f"{100 * account['retained']:.1f} % of the target layers, {100 * account['retained_total']:.1f} % of all",
        ),
        ("MiB to train", f"{memory} = {account['memory_mib']:.1f}"),
        ("GFLOPs a sample", "not measured" if account["flops"] is None else f"{account['flops'] / 1e9:.3f}"),
        ("seconds", ", ".join(f"{k} {v:.1f}" for k, v in result["seconds"].items())),
        ("result", str(path)),
        ("again with", result["command"]),
    ]
    if account["retained"] > 1.01 and getattr(methods, result["method"]["name"]).compresses:
        table.append(("note", "the target layers store more than dense: these ranks adapt, they do not compress"))
    return table


def quiet() -> None:
    """Lightning's hints about loaders and loggers say nothing about a run."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
