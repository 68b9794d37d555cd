"""A run's result.json, put together from what its parts found."""

import shlex
from collections import Counter
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from torch import nn

from recombine import results
from recombine.core.account import count, layer_report
from recombine.core.method import method_classes
from recombine.core.packing import MIX
from recombine.core.rewrite import Step
from recombine.layers.packed import packed_in
from recombine.models.weights import origin
from recombine.result_schema import AnalysisPart, MethodPart, Result, RunPart, StagePart
from recombine.runner.config import RunSpec
from recombine.runner.labels import label_of
from recombine.runtime.digest import file_digest, remembered_digest
from recombine.runtime.environment import environment
from recombine.stages.context import RunContext
from recombine.training import distributed


def assemble_result(spec: RunSpec, run: RunContext, stage: StagePart, analysis: AnalysisPart) -> Result:
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
        "sha256": weight_digests(run.out, stage.get("checkpoint")) if distributed.rank() == 0 else {},
        "seconds": run.seconds,
        "config": spec.config,
        "environment": environment(),
    }
    if run.base is not None:
        runner["base"] = {"path": str(run.base), "sha256": remembered_digest(run.base)}
    runner |= quantized(run, runner["layers"])
    if record and (tokens := run.calibration_sha256()) is not None:
        runner["calibration_sha256"] = tokens
    if run.pictures:
        runner["pictures"] = run.pictures
    if record and record.notes:
        runner["notes"] = record.notes
    result = results.merge_parts(runner=runner, **{run.settings.stage.name: stage}, analysis=analysis)
    for key in ("val", "test"):
        result.setdefault(key, {})
    if "method" not in result:
        last = run.merged or (record.steps[-1] if record and record.steps else None)
        result["method"] = last and describe_step(run, last, "method")
    if "account" not in result:
        result["account"] = count(run.model, run.typical_input()).as_dict()
    order = [*Result.__annotations__, *result]  # a key that the schema lacks comes last
    return {key: result[key] for key in dict.fromkeys(order) if key in result}


def quantized(run: RunContext, layers: list[dict]) -> dict:
    """What the result says of packed weights; nothing where there are none. layers: of `layer_report`."""
    tensors = {id(packed): packed for packed in packed_in(run.model).values()}
    if not tensors and run.choices is None:
        return {}
    first, mixed = next(iter(tensors.values()), None), bool(run.model.recombined.bits)
    part = {"bits": MIX if mixed else first and first.bits, "group": first and first.group, "tensors": len(tensors)}
    part |= {"mix": dict(Counter(map(words_of, layers)))} if mixed else {}
    return {"quantized": part if run.choices is None else part | {"choices": run.choices}}


def words_of(layer: dict) -> str:
    """How a layer is kept under a mix: "4 bits, low rank"."""
    return f"{f'{bits} bits' if (bits := layer.get('bits')) else 'float'}, {'low rank' if 'rank' in layer else 'dense'}"


def weight_digests(out: Path, scored: str | None) -> dict[str, str]:
    """The sha256 of the files of weights in a run's folder, or of the one that it scored, by file name."""
    paths = {path.name: path for path in sorted(out.glob("*.safetensors"))}
    if scored is not None:
        paths.setdefault(Path(scored).name, Path(scored))
    return {name: file_digest(path) for name, path in paths.items()}


def asked_for(run: RunContext) -> RunPart:
    """What the user asked for, without `method`, which a stage may know better."""
    hydra = HydraConfig.get() if HydraConfig.initialized() else None
    overrides = list(hydra.overrides.task) if hydra else []
    overrides = [f"data.task={run.data.task}" if o == "data.task=all" else o for o in overrides]
    record = getattr(run.model, "recombined", None)
    pair = record is not None and len(record.steps) > 1
    return {
        "command": " ".join(["python run.py", *map(shlex.quote, overrides)]),
        "stage": run.settings.stage.name,
        "model": run.model.recombine_source,
        "weights": pretrained_weights(run.model) if distributed.rank() == 0 else {},
        "compressor": describe_step(run, record.steps[0], "compressor") if pair or run.merged else None,
        "budget": str(run.budget),
        "data": run.data.info | {"title": run.data.title},
        "calibration": None if run.calibration_data is None else run.calibration_data.info,
        "seed": run.settings.seed,
        "metric": run.objective().metric,
    }


def pretrained_weights(model: nn.Module) -> dict:
    """Where the model's pretrained weights came from: hub, commit and sha256; nothing where it has none."""
    path = getattr(model, "recombine_weights", None)
    return {} if path is None else origin(path)


def describe_step(run: RunContext, step: Step, part: str) -> MethodPart:
    """What the result says of a method that rewrote the model.

    Args:
        part: method or compressor, whose label the step gets; a step out of a checkpoint gets the label of its fields.
    """
    own = {type(method).__name__: type(method) for method in (run.compressor, run.method) if method}
    cls = own.get(step.method) or method_classes()[step.method]
    loaded = run.settings.stage.name in ("evaluate", "sample")
    label = label_of(step.method, step.fields) if loaded or part not in run.labels else run.labels[part]
    return results.method_part(step.method, step.fields, label, cls.compresses)
