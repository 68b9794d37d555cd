"""Writes a recombined model as a Hugging Face folder with its own code, which runs without recombine."""

import inspect
import json
import logging
import re
import sys
from collections.abc import Callable
from functools import partial
from importlib import util
from pathlib import Path
from types import ModuleType
from typing import Any

import timm
from safetensors.torch import save_file
from timm.models import get_model_args
from torch import nn

from recombine.errors import UsageError
from recombine.export import hf_text
from recombine.export.cut import rotary_text
from recombine.export.plan import Plan, planned, replaced
from recombine.models import rebuild, roles
from recombine.runtime.atomic import atomic_write

log = logging.getLogger(__name__)

CODE = "modeling_recombined"
TASKS = {  # end of a class's name -> the Auto class of its task
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "MeanPooled": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForImageClassification": "AutoModelForImageClassification",
}
MEAN_POOLED = "BertModel, BertPreTrainedModel"  # what `models.encoders.MeanPooled` is made of


def write(model: nn.Module, folder: Path) -> Path:
    """Writes config.json, the code and model.safetensors of a recombined model into a folder that is there.

    Raises:
        UsageError: the model cannot be built again from what the folder would say.
    """
    architecture = rebuild.architecture(model)
    if architecture is None:
        raise UsageError(
            f"this {type(model).__name__} is neither timm's nor transformers' own, so no folder of kind hf can build "
            "it; save it with recombine.save"
        )
    plan, of_timm = planned(model, folder), architecture["library"] == "timm"
    prefix = "model." if of_timm else ""
    tensors = {f"{prefix}{name}": tensor.detach().contiguous() for name, tensor in plan.tensors.items()}
    (folder / f"{CODE}.py").write_text(code(model, of_timm), encoding="utf-8")
    module = imported(folder / f"{CODE}.py")
    cls = getattr(module, class_name(model, of_timm))
    config = configuration(model, architecture, plan, module, cls)
    methods = " and ".join(step.method for step in model.recombined.steps)
    inside = tuple(f"{name}." for name in {*model.recombined.targets, *replaced(model)})
    require_same(model, twin(partial(cls, config)), tensors, methods, prefix, inside)
    (folder / "config.json").write_text(config.to_json_string(), encoding="utf-8")
    with atomic_write(folder / "model.safetensors") as temporary:
        save_file(tensors, temporary, {"format": "pt"})
    if of_timm:
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor(model), indent=2), encoding="utf-8")
    elif model.can_generate():
        model.generation_config.save_pretrained(folder)
    return folder


def task_class(name: str) -> str:
    """The Auto class of the task that a model class's name ends in; AutoModel where it has none."""
    return next((auto for end, auto in TASKS.items() if name.endswith(end)), "AutoModel")


def class_name(model: nn.Module, timm: bool) -> str:
    """The name of the exported class."""
    return "RecombinedForImageClassification" if timm else f"Recombined{type(model).__name__}"


def code(model: nn.Module, timm: bool) -> str:
    """The text of the folder's module: our layers, the class of the model, and its configuration."""
    from recombine.export import hf_models  # imports transformers, which is slow

    name, own = type(model).__name__, type(model).__module__.startswith("recombine.")
    base = rotary_text(model) + inspect.getsource(hf_models.OfTimm if timm else hf_models.OfTransformers)
    if timm:
        imports = "import timm\nfrom transformers import PretrainedConfig, PreTrainedModel\n"
        imports += "from transformers.modeling_outputs import ImageClassifierOutput\n"
        config, kind, parents = "PretrainedConfig", "timm", "OfTimm"
    else:
        config, kind = type(model.config).__name__, model.config.model_type
        parents = f"OfTransformers, {name}"
        imports = f"from transformers import {config}, {MEAN_POOLED if own else name}\n"
        if own:
            imports += "from transformers.modeling_outputs import SequenceClassifierOutput\n"
            base += f"\n\n{inspect.getsource(type(model))}"
    first, rest = hf_text.layers()
    exported = class_name(model, timm)
    return f'''{first}{imports}{rest}

{base}

class RecombinedConfig({config}):
    """The configuration of the plain model, with the layers that replace its own under `recombined`."""

    model_type = "recombined_{kind}"


class {exported}({parents}):
    """A compressed {name}, made with recombine."""

    config_class = RecombinedConfig
    _auto_class = "{task_class(exported)}"


RecombinedConfig._auto_class = "AutoConfig"
'''


def imported(path: Path) -> ModuleType:
    """The module of that file, under a name of its own."""
    spec = util.spec_from_file_location(f"recombine_exported_{abs(hash(path))}", path)
    module = util.module_from_spec(spec)
    sys.modules[spec.name] = module  # transformers looks there for a class's module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[spec.name]
    return module


def configuration(model: nn.Module, architecture: dict, plan: Plan, module: ModuleType, cls: type) -> Any:
    """The configuration of the exported model."""
    if architecture["library"] == "timm":
        classes = roles.classes(model) or 0
        config = module.RecombinedConfig(timm=timm_arguments(model, architecture))
        if classes:
            config.num_labels = classes
    else:
        skipped = {*rebuild.NOT_BUILT_FROM, "use_cache"}
        values = {k: v for k, v in model.config.to_diff_dict().items() if k not in skipped}
        config = module.RecombinedConfig.from_dict(values)
    config.recombined = plan.told()
    named = f"{CODE}.{cls.__name__}"
    config.architectures = [cls.__name__]
    config.auto_map = {"AutoConfig": f"{CODE}.RecombinedConfig", "AutoModel": named, task_class(cls.__name__): named}
    config.dtype = next(model.parameters()).dtype
    return config


def timm_arguments(model: nn.Module, architecture: dict) -> dict:
    """What timm.create_model takes: the model's name, and its arguments as timm has noted them.

    Raises:
        UsageError: one of them is code.
    """
    arguments, tag = get_model_args(model), architecture.get("tag")
    for key, name in (("drop_path", "drop_path_rate"), ("attn_drop", "attn_drop_rate")):
        if architecture.get(key):
            arguments[name] = architecture[key]
    try:
        json.dumps(arguments)
    except TypeError as error:
        why = f"was built with arguments that are code ({error})"
        raise UsageError(
            f"cannot be exported: this {type(model).__name__} {why}; keep it with recombine.save"
        ) from error
    tagged = architecture["arch"] if tag in (None, "packaged") else f"{architecture['arch']}.{tag}"
    return {"model": tagged, "arguments": arguments}


def twin(build: Callable[[], nn.Module]) -> nn.Module:
    """The model that is built so, without weights.

    Raises:
        UsageError: its library refuses to build it.
    """
    try:
        return rebuild.without_weights(build)
    except Exception as error:  # timm and transformers raise nearly every kind
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"cannot be exported: its library builds no such model ({reason}); save it instead") from error


def plain_twin(model: nn.Module, architecture: dict) -> tuple[nn.Module, dict]:
    """(the plain model without weights, what timm takes to build it) of an architecture."""
    if architecture["library"] == "transformers":
        return rebuild.rebuilt(architecture), {}
    arguments = timm_arguments(model, architecture)
    return twin(partial(timm.create_model, arguments["model"], **arguments["arguments"])), arguments


def require_same(
    model: nn.Module, twin: nn.Module, tensors: dict, methods: str, prefix: str = "", replaced: tuple[str, ...] = ()
) -> None:
    """Compares the exported model with the tensors of its file, and with what the model computes beside its layers.

    Args:
        tensors: of the file.
        methods: what made the model, for the error.
        prefix: of the names in the exported model. replaced: beginnings of the names of what is not compared.

    Raises:
        UsageError: names the first difference, as a pruned model has it.
    """
    made = dict(twin.named_parameters()) | {k: b for k, b in twin.named_buffers() if k in twin.state_dict()}
    fix = f"{methods} made a {type(model).__name__} that its library does not build; keep it with recombine.save"
    for name in sorted(tensors.keys() ^ made.keys()):
        raise UsageError(f"cannot be exported: {name} is in only one of this model and its plain twin: {fix}")
    for name, tensor in tensors.items():
        if tensor.shape != made[name].shape:
            sizes = f"{tuple(tensor.shape)} and not {tuple(made[name].shape)}"
            raise UsageError(f"cannot be exported: {name} is {sizes}: {fix}")
    inner = twin.model if prefix else twin
    theirs = dict(inner.named_modules())
    for name, module in model.named_modules():
        if name not in theirs or f"{name}.".startswith(replaced or ("\0",)):
            continue
        here, there = rebuild.plain_attributes(module), rebuild.plain_attributes(theirs[name])
        for key in sorted(here.keys() & there.keys()):
            if here[key] != there[key]:
                where = re.sub(r"^\.", "", f"{name}.{key}")
                raise UsageError(f"cannot be exported: {where} is {here[key]} and not {there[key]}: {fix}")
    tables = dict(inner.named_buffers())
    for name, buffer in rebuild.own_buffers(model, inner).items():
        if name not in tables or not rebuild.same(tables[name].to(buffer), buffer):
            raise UsageError(f"cannot be exported: the values of {name} are its own: {fix}")
        log.warning("exported with %s as it was before the model was cast, which rounded it", name)


def preprocessor(model: nn.Module) -> dict:
    """How images become inputs, for AutoImageProcessor."""
    told = getattr(model, "recombine_source", None) or model.pretrained_cfg
    size = told.get("image_size") or told["input_size"][-1]
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": size, "width": size},
        "resample": 3,
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": list(told["mean"]),
        "image_std": list(told["std"]),
    }
