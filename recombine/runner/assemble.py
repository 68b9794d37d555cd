"""What a run is called, and its result.json put together from what its parts found."""

from collections.abc import Mapping
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from recombine import results
from recombine.core import checkpoint
from recombine.core.budget import count, layer_report
from recombine.core.method import Method, Step
from recombine.result_schema import AnalysisPart, MethodPart, Result, RunPart, StagePart
from recombine.runner.grid import CONF
from recombine.stages.context import Run

QUOTED = set("[]{}() *")  # a shell would read these
CHOICES = {"method": "method", "compressor": "method@compressor"}  # part of the configuration -> Hydra's group


def chosen_labels(cfg: DictConfig) -> dict[str, str]:
    """The words that the user chose the methods by: {"compressor": "svd", "method": "lora"}.

    Without a compressor there is no such key. A word counts while its YAML names the class that runs, so with
    `method=svd method._target_=mine.Half` the method is called "half". Without Hydra the word is that of `label_of`.
    """
    choices = HydraConfig.get().runtime.choices if HydraConfig.initialized() else {}
    found = {}
    for part in ("compressor", "method"):
        if (config := cfg.get(part)) is None:
            continue
        word, cls = choices.get(CHOICES[part]), get_class(config._target_)
        file = CONF / "method" / f"{word}.yaml"  # a word without a file here is from a folder of the user's
        typed = word is not None and (not file.is_file() or get_class(OmegaConf.load(file)._target_) is cls)
        found[part] = word if typed else label_of(cls.__name__, OmegaConf.to_container(config, resolve=True))
    return found


def label_of(name: str, fields: Mapping[str, Any]) -> str:
    """The word of conf/method for a method with these fields, or the name of its class in lower case.

    Several words share the class Peft. They are told apart by all fields that are words or switches.

    Args:
        name: of the method's class.
    """
    files = {path.stem: OmegaConf.to_container(OmegaConf.load(path)) for path in (CONF / "method").glob("*.yaml")}
    words = [word for word, yaml in files.items() if yaml["_target_"].rpartition(".")[2] == name]
    if len(words) > 1:
        words = [word for word in words if kind_of(files[word]) == kind_of(fields)]
    return words[0] if len(words) == 1 else name.lower()


def kind_of(fields: Mapping[str, Any]) -> dict[str, str | bool]:
    """The fields that are words or switches, and those of nested fields: {"config": "LoraConfig", "options.use_dora":
    True}."""
    flat = results.flat({key: value for key, value in fields.items() if key != "_target_"})
    return {key: value for key, value in flat.items() if isinstance(value, str | bool)}


def assemble_result(run: Run, stage: StagePart, analysis: AnalysisPart) -> Result:
    """The result of a run: what was asked for, what its stage found and what was measured afterwards.

    Raises:
        AssertionError: two of these write the same key.
    """
    record = getattr(run.model, "recombined", None)
    probe = run.probe and {key: getattr(run.probe, key) for key in ("val", "test", "decay")}
    runner = asked_for(run) | {
        "linear_probe": probe,
        "layers": layer_report(run.model) if record else [],
        "curves": run.curves.get("best", {}),
        "seconds": run.seconds,
        "config": results.settings(run.cfg),
        "environment": results.environment(),
    }
    found = results.merge_parts(runner=runner, **{run.cfg.stage.name: stage}, analysis=analysis)
    for key in ("val", "test"):
        found.setdefault(key, {})
    if "method" not in found:
        found["method"] = describe_step(run, record.steps[-1], "method") if record else None
    if "account" not in found:
        found["account"] = count(run.model, run.sample()).as_dict()
    order = [*Result.__annotations__, *found]  # a key that the schema lacks comes last
    return {key: found[key] for key in dict.fromkeys(order) if key in found}


def asked_for(run: Run) -> RunPart:
    """What the user asked for, without `method`, which a stage may know better."""
    hydra = HydraConfig.get() if HydraConfig.initialized() else None
    overrides = list(hydra.overrides.task) if hydra else []
    overrides = [f"data.task={run.data.task}" if o == "data.task=all" else o for o in overrides]
    record = getattr(run.model, "recombined", None)
    pair = record is not None and len(record.steps) > 1
    return {
        "command": " ".join(["python run.py", *(f"'{o}'" if set(o) & QUOTED else o for o in overrides)]),
        "stage": run.cfg.stage.name,
        "model": run.model.recombine_source,
        "compressor": describe_step(run, record.steps[0], "compressor") if pair else None,
        "budget": str(run.budget),
        "data": run.data.info,
        "calibration": None if run.calibration is None else run.calibration.info,
        "seed": run.cfg.seed,
        "metric": run.task().metric,
    }


def describe_step(run: Run, step: Step, part: str) -> MethodPart:
    """What the result says of a method that rewrote the model.

    Args:
        part: method or compressor, whose label the step gets; a step out of a checkpoint gets the label of its fields.
    """
    classes: dict[str, type[Method]] = {type(m).__name__: type(m) for m in (run.compressor, run.method) if m}
    cls = classes.get(step.method) or checkpoint.method_class(run.out, step.method)
    loaded = run.cfg.stage.name == "evaluate"
    label = label_of(step.method, step.fields) if loaded else run.labels[part]
    return results.method_part(step.method, step.fields, label, cls.compresses)
