"""From a composed configuration to a `RunSpec`: the only reader of the whole configuration.

What is below the runner gets plain values and typed settings, never the configuration itself.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from recombine import results
from recombine.core.budget import Budget
from recombine.core.method import Method
from recombine.errors import UsageError
from recombine.methods.from_config import from_config, from_name
from recombine.runner.labels import chosen_labels
from recombine.runner.typed_settings import group, typed
from recombine.runtime import conf
from recombine.stages import STAGES
from recombine.stages.settings import (
    STAGE_SETTINGS,
    AnalysisSettings,
    CalibrationSettings,
    HarnessSettings,
    RunSettings,
    StageSettings,
)
from recombine.training.lit import OPTIMIZERS
from recombine.training.loggers import LoggerSettings
from recombine.training.settings import DistillationSettings, OptimizerSettings, TrainerSettings

GROUPS = ("model", "data", "method", "stage", "optim", "trainer", "logger", "calibration", "harness", "analyse")


@dataclass(frozen=True)
class RunSpec:
    """One run, resolved.

    config: the configuration as plain values, as result.json keeps it.
    compressor: compresses first, then `method` adapts; None: there is only the method.
    labels: what the user called them, by "compressor" and "method".
    data, model: arguments of `data.build` and `models.build`. calibration_data: of the data that calibrates; None: the
    run's own. transfer_tasks: other tasks of the same data that are probed before and after.
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


def resolve(cfg: DictConfig) -> RunSpec:
    """The run that a composed configuration describes.

    Raises:
        UsageError: a value that would fail, or mislead, only after minutes of work.
    """
    validate_config(cfg)
    method, compressor = resolve_methods(cfg)
    labels = chosen_labels(cfg)
    method.label = labels["method"]
    if compressor is not None:
        compressor.label = labels["compressor"]
    plain = OmegaConf.to_container(cfg, resolve=True)
    calibration = dict(plain["calibration"])
    chosen = calibration.pop("data")
    analyse = dict(plain["analyse"])
    transfer_tasks = tuple(analyse.pop("elsewhere"))
    data = OmegaConf.to_container(cfg.data, resolve=True, throw_on_missing=True)
    return RunSpec(
        config=results.settings(cfg),
        settings=RunSettings(
            seed=cfg.seed,
            stage=stage_settings(plain["stage"]),
            optim=typed(OptimizerSettings, plain["optim"], "optim"),
            trainer=typed(TrainerSettings, plain["trainer"], "trainer"),
            calibration=typed(CalibrationSettings, calibration, "calibration"),
            analyse=typed(AnalysisSettings, analyse, "analyse"),
            harness=typed(HarnessSettings, plain["harness"], "harness"),
            probe=cfg.probe,
        ),
        method=method,
        compressor=compressor,
        labels=labels,
        budget=Budget.parse(cfg.budget),
        data=data | {"seed": cfg.seed},
        model=plain["model"],
        calibration_data=calibration_data(chosen, cfg.seed),
        transfer_tasks=transfer_tasks,
        logger=typed(LoggerSettings, plain["logger"], "logger"),
    )


def stage_settings(values: Mapping[str, Any]) -> StageSettings:
    """The settings of the stage that `values` name."""
    values = dict(values)
    if "distil" in values:
        values["distil"] = typed(DistillationSettings, values["distil"], "stage.distil")
    if "reference" in values:
        reference = dict(group(values["reference"], "stage.reference"))
        values["reference"] = from_name(reference.pop("name"), reference, "stage.reference.name")
    return typed(STAGE_SETTINGS.get(values["name"], StageSettings), values, "stage")


def calibration_data(chosen: Any, seed: int) -> dict[str, Any] | None:
    """The arguments of the data that calibrates: conf/data/<name>.yaml with what the user set; None: the run's own.

    Args:
        chosen: a name, for example "text", or the keys of calibration.data.
    """
    chosen = {"name": chosen} if not isinstance(chosen, dict) else chosen
    if (name := chosen.get("name")) is None:
        return None
    return (conf.load("data", name) or {}) | chosen | {"seed": seed}


def resolve_methods(cfg: DictConfig) -> tuple[Method, Method | None]:
    """The methods of a run: (the method, the compressor before it or None).

    A method with itself as the compressor is one method, which trains the factors that it compressed to.

    Raises:
        UsageError: the two cannot follow each other.
    """
    method = from_config(cfg.method)
    if cfg.get("compressor") is None:
        return method, None
    compressor = from_config(cfg.compressor)
    name = chosen_labels(cfg)["compressor"]
    if not compressor.compresses:
        raise UsageError(f"method@compressor: {name} does not compress; choose one that does")
    if cfg.stage.name == "compress":
        raise UsageError("stage=compress applies the compressor alone: name it as method=, or take stage=joint")
    if type(compressor) is type(method):
        bare = [replace(part, lr=0.0, targets=()) for part in (method, compressor, type(method)())]
        if bare[0] not in bare[1:]:
            raise UsageError(
                f"method={name} after itself trains the compressor's factors: set its fields as compressor.*"
            )
        return replace(compressor, lr=method.lr), None
    return method, compressor


def validate_config(cfg: DictConfig) -> None:
    """Refuses settings that would fail, or mislead, only after minutes of work.

    Raises:
        UsageError: names the first of them.
    """

    def require(key: str, ok, why: str) -> None:
        value = OmegaConf.select(cfg, key)
        if not ok(value):
            raise UsageError(f"{key}={value}: must be {why}")

    number = lambda x: isinstance(x, int | float) and x >= 0  # noqa: E731
    whole = lambda x: isinstance(x, int) and x >= 1  # noqa: E731
    share = lambda x: x is None or isinstance(x, int | float) and 0 < x <= 1  # noqa: E731
    for key in GROUPS:
        group(OmegaConf.select(cfg, key), key)
    require("seed", lambda x: isinstance(x, int) and 0 <= x < 2**32, "a whole number from 0 to 2^32 - 1")
    if "distil" in cfg.stage:
        group(cfg.stage.distil, "stage.distil")
        require("stage.distil.epochs", lambda x: isinstance(x, int) and x >= 0, "a whole number from 0")
    Budget.parse(cfg.budget)
    require("optim.name", lambda x: x in OPTIMIZERS, f"one of {', '.join(OPTIMIZERS)}")
    require("stage.name", lambda x: x in STAGES, f"one of {', '.join(STAGES)}")
    require("optim.head", lambda x: x in ("random", "probe"), "random or probe")
    require("optim.lr", lambda x: x is None or number(x), "a number from 0, or null for the method's own")
    for key in ("lr_head", "weight_decay", "warmup", "label_smoothing"):
        require(f"optim.{key}", number, "a number from 0")
    require("harness.limit", lambda x: x is None or whole(x), "a whole number from 1, or null for all documents")
    for key in ("samples", "batch_size"):
        require(f"calibration.{key}", whole, "a whole number from 1")
    require("probe", lambda x: isinstance(x, bool), "true or false")
    names = lambda x: isinstance(x, ListConfig) and all(isinstance(name, str) for name in x)  # noqa: E731
    require("analyse.elsewhere", names, "a list of tasks; say analyse.elsewhere=[task]")
    require("analyse.subspaces", share, "a share of the energy in (0, 1], or null")
    require("analyse.maps", lambda x: x is None or whole(x), "a whole number from 1, or null")
    require("trainer.epochs", whole, "a whole number from 1")
    require("trainer.patience", lambda x: x is None or whole(x), "a whole number from 1, or null")
    if "bits" in cfg.stage:
        why = "a whole number from 2 to 16, or null for weights as they are"
        require("stage.bits", lambda x: x is None or isinstance(x, int) and 2 <= x <= 16, why)
    if cfg.stage.name == "evaluate":
        why = "the file of a checkpoint, which result.json of a run names, or null for the original model"
        require("stage.checkpoint", lambda x: x is None or Path(str(x)).is_file(), f"{why} (no such file)")
