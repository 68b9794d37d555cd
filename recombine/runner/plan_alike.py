"""Runs that take the same: what a rehearsal depends on, so that the cells of a grid share one."""

from dataclasses import asdict, fields, replace

from recombine.core.method import Method
from recombine.data.base import DataModule
from recombine.data.prompted.base import PromptedData
from recombine.runner.config import RunSpec
from recombine.runner.plan_devices import Device
from recombine.stages.settings import AnalysisSettings, HarnessSettings
from recombine.training.settings import OptimizerSettings

TOLD = ("objective", "num_classes", "image_size", "max_length", "batch_size", "foreseen", "prior_count")  # by the data


def key(spec: RunSpec, module: DataModule, device: Device) -> str:
    """All that a run's rehearsal depends on: the run without its seeds, its rates, and what is measured afterwards.

    Tasks of one data set are alike where the numbers of their samples and classes are.
    """
    rates = {field.name: field.default for field in fields(OptimizerSettings) if field.name != "name"}
    settings, stage = spec.settings, spec.settings.stage
    if hasattr(stage, "distil"):
        stage = replace(stage, distil=replace(stage.distil, **rates))
    if hasattr(stage, "reference"):
        stage = replace(stage, reference=None)
    settings = replace(settings, seed=0, stage=stage, optim=replace(settings.optim, label_smoothing=0.0, **rates))
    settings = replace(settings, analyse=AnalysisSettings(), harness=HarnessSettings())
    task = () if isinstance(module, PromptedData) else ("task",)
    given = [plain(values, "seed", *task) for values in (spec.data, spec.calibration_data or {})]
    told = [getattr(module, name, None) for name in TOLD]
    methods = [fields_of(method) for method in (spec.method, spec.compressor)]
    machine = device.name, device.memory, device.gpu
    return repr((machine, spec.model, methods, spec.budget, spec.base, settings, given, type(module).__name__, told))


def fields_of(method: Method | None) -> dict | None:
    """A method as plain values, without its rate."""
    return method and {"label": method.label, "class": type(method).__name__} | plain(asdict(method), "lr")


def plain(values: dict, *without: str) -> dict:
    """The values without some of them."""
    return {name: value for name, value in values.items() if name not in without}
