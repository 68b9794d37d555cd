"""From a composed configuration to a `RunSpec`: the only reader of the whole configuration.

What is below the runner gets plain values and typed settings, never the configuration itself.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf

from recombine import data as data_sets
from recombine import models, results
from recombine.core.budget import Budget
from recombine.core.method import Method
from recombine.errors import UsageError
from recombine.export.folder import require
from recombine.methods.from_config import from_name
from recombine.runner.base import base_file
from recombine.runner.labels import chosen_labels
from recombine.runner.method_pair import ready, resolve_methods
from recombine.runtime import conf
from recombine.runtime.kinds import Place, Seed, Word, shown
from recombine.runtime.schema import annotations, checked, group, typed
from recombine.stages import STAGES, mix
from recombine.stages.compress import require_compressor
from recombine.stages.profile import require_predictable
from recombine.stages.settings import (
    STAGE_SETTINGS,
    AnalysisSettings,
    CalibrationSettings,
    DrawingSettings,
    HarnessSettings,
    QuantizeSettings,
    RunSettings,
    StageSettings,
)
from recombine.training.loggers import LoggerSettings
from recombine.training.settings import TaskSettings, TrainerSettings

Format = Literal["hf", "dense", "lora", "torch", "onnx", "openvino"]  # of recombine/export


@dataclass(frozen=True, kw_only=True)
class RootKeys:
    """The keys of the configuration that are no groups."""

    seed: Seed = 0
    probe: bool = True
    budget: Word = "none"
    grid: Any = None
    only: Word | list[Word] | None = None
    retry: bool = False
    report: Mapping[str, Any] | None = None
    export: Format | list[Format] | None = None
    base: Place | None = None


NODES = {  # node -> the schema of its keys, where it is always the same
    "": RootKeys,
    "optim": TaskSettings,
    "trainer": TrainerSettings,
    "calibration": CalibrationSettings,
    "analyse": AnalysisSettings,
    "quantize": QuantizeSettings,
    "harness": HarnessSettings,
    "sample": DrawingSettings,
    "logger": LoggerSettings,
}
GROUPS = ("model", "data", "method", "stage", *filter(None, NODES))


@dataclass(frozen=True)
class RunSpec:
    """One run, resolved.

    config: the configuration as plain values, as result.json keeps it.
    compressor: compresses first, then `method` adapts; None: there is only the method.
    labels: what the user called them, by "compressor" and "method".
    data, model: arguments of `data.build` and `models.build`. calibration_data: of the data that calibrates; None: the
    run's own. transfer_tasks: other tasks of the same data that are probed before and after. export: formats of the
    folders that the run ends with. base: file of the compressed checkpoint that it starts from; None: from the model.
    """

    config: dict[str, Any]
    settings: RunSettings
    method: Method
    compressor: Method | None
    labels: dict[str, str]
    budget: Budget
    data: dict[str, Any]
    model: dict[str, Any]
    calibration_data: dict[str, Any] | None
    transfer_tasks: tuple[str, ...]
    logger: LoggerSettings
    export: tuple[str, ...]
    base: Path | None = None


def resolve(cfg: DictConfig) -> RunSpec:
    """The run that a composed configuration describes.

    Raises:
        UsageError: a value that would fail, or mislead, only after minutes of work.
    """
    validate_root(cfg)
    plain = OmegaConf.to_container(cfg, resolve=True)
    stage, export = stage_settings(plain["stage"]), formats(plain.get("export"))
    methods = resolve_methods(cfg)
    labels, budget = chosen_labels(cfg), Budget.parse(cfg.budget)
    method, compressor = ready(*methods, labels, budget.kind)
    calibration, analyse = dict(plain["calibration"]), dict(plain["analyse"])
    chosen, transfer_tasks = calibration.pop("data"), analyse.pop("elsewhere")
    if not isinstance(transfer_tasks, list) or not all(isinstance(task, str) for task in transfer_tasks):
        why = "must be a list of tasks; say analyse.elsewhere=[task]"
        raise UsageError(f"analyse.elsewhere={shown(transfer_tasks)}: {why}")
    quantize = typed(QuantizeSettings, plain["quantize"], "quantize")
    mix.require(quantize, stage, budget, plain.get("base"))
    require_compressor(stage, method, compressor, labels["method"])
    require_predictable(stage, method, compressor, quantize)
    data = OmegaConf.to_container(cfg.data, resolve=True, throw_on_missing=True)
    data_sets.check(**data | {"seed": cfg.seed})
    models.check(**plain["model"])
    return RunSpec(
        config=results.settings(cfg),
        settings=RunSettings(
            seed=cfg.seed,
            stage=stage,
            optim=typed(TaskSettings, plain["optim"], "optim"),
            trainer=typed(TrainerSettings, plain["trainer"], "trainer"),
            calibration=typed(CalibrationSettings, calibration, "calibration"),
            analyse=typed(AnalysisSettings, analyse, "analyse"),
            harness=typed(HarnessSettings, plain["harness"], "harness"),
            quantize=quantize,
            sample=typed(DrawingSettings, plain["sample"], "sample"),
            probe=cfg.probe,
        ),
        method=method,
        compressor=compressor,
        labels=labels,
        budget=budget,
        data=data | {"seed": cfg.seed},
        model=plain["model"],
        calibration_data=calibration_data(chosen, cfg.seed),
        transfer_tasks=tuple(transfer_tasks),
        logger=typed(LoggerSettings, plain["logger"], "logger"),
        export=export,
        base=base_file(plain.get("base"), stage.name, labels.get("compressor"), plain["model"]),
    )


def formats(chosen: str | list[str] | None) -> tuple[str, ...]:
    """The formats of `export=`.

    Raises:
        UsageError: one needs an extra that is not installed.
    """
    found = (chosen,) if isinstance(chosen, str) else tuple(chosen or ())
    for name in found:
        require(name)
    return found


def stage_schema(name: str) -> type[StageSettings]:
    """The schema of a stage's keys."""
    return STAGE_SETTINGS.get(name, StageSettings)


def stage_settings(values: Mapping[str, Any]) -> StageSettings:
    """The settings of the stage that `values` name. Keys of other stages, which an experiment sets for some of its
    cells, say nothing to this one.

    Raises:
        UsageError: there is no such stage, no stage has a key, or a value does not fit.
    """
    if not isinstance(name := values.get("name"), str) or name not in STAGES:
        raise UsageError(f"stage.name={name}: must be one of {', '.join(STAGES)}")
    cls = stage_schema(name)
    others = {key for stage in STAGE_SETTINGS.values() for key in annotations(stage)} - annotations(cls).keys()
    values = {key: value for key, value in values.items() if key not in others}
    if values.get("reference") is not None:
        reference = dict(group(values["reference"], "stage.reference"))
        values["reference"] = from_name(reference.pop("name", None), reference, "stage.reference")
    settings = typed(cls, values, "stage")
    require_checkpoint(settings)
    return settings


def calibration_data(chosen: Any, seed: int) -> dict[str, Any] | None:
    """The arguments of the data that calibrates: conf/data/<name>.yaml with what the user set; None: the run's own.

    Args:
        chosen: a name, for example "text", or the keys of calibration.data.
    """
    chosen = {"name": chosen} if not isinstance(chosen, dict) else chosen
    if (name := chosen.get("name")) is None:
        if lost := [key for key in chosen if key != "name"]:
            why = "has no effect without calibration.data.name; say data@calibration.data=<name> too"
            raise UsageError(f"calibration.data.{lost[0]}={shown(chosen[lost[0]])}: {why}")
        return None
    values = (conf.load("data", name) or {}) | chosen | {"seed": seed}
    data_sets.check(**values, key="calibration.data")
    return values


def validate_root(cfg: DictConfig) -> None:
    """Refuses a group that is one value, and what the keys beside the groups cannot be. An experiment may have others
    there, for its grid to refer to.

    Raises:
        UsageError: names the first of them.
    """
    for key in GROUPS:
        group(OmegaConf.select(cfg, key), key)
    checked(RootKeys, {key: OmegaConf.select(cfg, key) for key in cfg if key in annotations(RootKeys)}, "")


def require_checkpoint(stage: StageSettings) -> None:
    """Refuses a file that is not there.

    Raises:
        UsageError: names it.
    """
    path = getattr(stage, "checkpoint", None)
    if path is not None and not Path(path).expanduser().is_file():
        fix = "must be the file of a checkpoint, which result.json of a run names, or null for the original model"
        raise UsageError(f"stage.checkpoint={path}: there is no such file; it {fix}")
