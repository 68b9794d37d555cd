"""Any model of transformers by its name on the hub or its folder, for the task that the data ask for.

    model=hf model.name=Qwen/Qwen3-0.6B data=text
    model=hf model.name=FacebookAI/roberta-base data=glue
    model=hf model.name=FOLDER data=offline

Without weights (``pretrained=False``) the sizes are those of a folder's config.json, or keys of the configuration
beside its ``model_type``; the tokenizer is the folder's, else bytes. The commit of the hub's repository is kept with
the result, so that it is built again from the same weights.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

from recombine.errors import UsageError, first_line
from recombine.models import causal_lm, encoders, roles
from recombine.models.allowed import config_values
from recombine.models.hf_folder import UNREADABLE, folder, read_tokenizer, refuse_damaged
from recombine.models.recompute import recompute
from recombine.models.weights import silence
from recombine.runtime.kinds import Colours, Deviations, Name, Pixels, Place, Whole

TASKS = {
    "lm": AutoModelForCausalLM,
    "text": AutoModelForSequenceClassification,
    "image": AutoModelForImageClassification,
}
WAYS = "connect once, or give model.checkpoint=FOLDER, or model.pretrained=false"
NO_NAME = "model=hf: say which, by its name on the hub or its folder: model.name=Qwen/Qwen3-0.6B"
NO_TASK = f"model.task=null: say one of {', '.join(TASKS)}"
BYTES = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # of the byte tokenizers
FORMS = {"image_mean": "mean", "image_std": "std"}  # of preprocessor_config.json


def build(
    name: Name,
    *,
    arch: Name = "auto",
    task: Literal["lm", "text", "image"] | None = None,
    model_type: Name | None = None,
    revision: Name | None = None,
    pretrained: bool = True,
    checkpoint: Place | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    gradient_checkpointing: bool = False,
    image_size: Pixels | None = None,
    mean: Colours | None = None,
    std: Deviations | None = None,
    num_classes: Whole = 0,
    **sizes,
) -> nn.Module:
    """A transformers model for a task; ``model.recombine_source`` says where it came from.

    Args:
        name: of the hub's repository, or a folder.
        task: lm (the next token), text or image (classes).
        model_type: of a random model without a folder, as transformers calls it: "qwen3".
        revision: of the hub's repository; None: the newest commit.
        num_classes: outputs of the classifier; 0: those of the weights, or one.
        sizes: keys of the transformers configuration, in the place of its own.

    Raises:
        UsageError: the model cannot be had, is of no such task, or a key is not its own.
    """
    if name == "hf" or task is None:
        raise UsageError(NO_NAME if name == "hf" else NO_TASK)
    path, where = place(name, revision, pretrained, checkpoint)
    config = configuration(name, path, model_type, sizes | ({} if image_size is None else {"image_size": image_size}))
    own = 0 if task == "lm" else config.num_labels
    if task != "lm":
        config.num_labels = num_classes or own
        config.pad_token_id = getattr(config, "pad_token_id", None) or 0  # decoders have none
    weights = path if pretrained else None
    model, whole = load(name, weights, config, task, dtype) if weights else (empty(name, config, task, dtype), False)
    model.config.use_cache = False  # as in causal_lm.py
    if gradient_checkpointing:
        recompute(model, True)
    model.own_classes, model.recombine_weights = own if whole else 0, weights
    model.recombine_source = {"name": name, "library": "transformers", "arch": arch, "task": task} | where
    model.recombine_source |= {"model_type": config.model_type, "dtype": dtype, "num_classes": num_classes}
    model.recombine_source |= {"gradient_checkpointing": gradient_checkpointing, **sizes}
    if task == "image":
        model.recombine_source |= _normalisation(path, config, mean, std)
    return model.train()


def place(name: str, revision: str | None, pretrained: bool, checkpoint: str | Path | None) -> tuple[Path | None, dict]:
    """The model's folder (None: there is none), and the arguments of `build` that find the same again."""
    checkpoint = name if checkpoint is None and (Path(name) / "config.json").is_file() else checkpoint
    where = {"revision": revision, "pretrained": pretrained, "checkpoint": checkpoint and str(checkpoint)}
    path = folder(name, WAYS, id=name, tag=None, **where | {"revision": revision or "main"})
    if path is not None and checkpoint is None:
        where["revision"] = path.name  # the commit
    return path, where


def configuration(name: str, path: Path | None, model_type: str | None, sizes: Mapping) -> PretrainedConfig:
    """The configuration of the folder, or of the model type, with these values in the place of its own.

    Raises:
        UsageError: there is neither, or the configuration has no such key, or refuses its value.
    """
    if path is None and model_type is None:
        raise UsageError(
            f"model {name}: model.pretrained=false fetches nothing: give model.checkpoint=FOLDER with a config.json, "
            f"or model.model_type=qwen3 and sizes, as in +model.hidden_size=64"
        )
    try:
        plain = AutoConfig.from_pretrained(path, local_files_only=True) if path else AutoConfig.for_model(model_type)
        config_values(type(plain), sizes)
        if path:
            return AutoConfig.from_pretrained(path, local_files_only=True, **sizes)
        return AutoConfig.for_model(model_type, **{k: v for k, v in BYTES.items() if hasattr(plain, k)} | sizes)
    except UsageError:
        raise
    except (*UNREADABLE, StrictDataclassError, ZeroDivisionError) as error:
        raise UsageError(f"model {name}: no configuration can be made ({first_line(error)}); correct it") from error


def empty(name: str, config: PretrainedConfig, task: str, dtype: str) -> nn.Module:
    """A random model of this configuration.

    Raises:
        UsageError: transformers has none of it for the task, or refuses its sizes.
    """
    try:
        return TASKS[task].from_config(config, dtype=causal_lm.DTYPES[dtype])
    except (*UNREADABLE, AssertionError, ZeroDivisionError, StrictDataclassError) as error:
        raise UsageError(f"model {name}: cannot be built for task {task} ({first_line(error)})") from error


def load(name: str, path: Path, config: PretrainedConfig, task: str, dtype: str) -> tuple[nn.Module, bool]:
    """The folder's weights, and whether it gives those of the classifier too.

    Raises:
        UsageError: the folder cannot be read, is of no such task, or lacks tensors outside the classifier.
    """
    try:
        with silence():
            model, told = TASKS[task].from_pretrained(
                path,
                config=config,
                dtype=causal_lm.DTYPES[dtype],
                local_files_only=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except UNREADABLE as error:
        raise UsageError(
            f"model {name}: {path} cannot be loaded for task {task} ({first_line(error)}); take another model or task"
        ) from error
    head = roles.head(model)
    owned = {id(p) for p in head.parameters()} if head is not None else set()
    heads = {key for key, p in model.named_parameters(remove_duplicate=False) if id(p) in owned}
    lacking = {key for key in told["missing_keys"] if key not in heads and "pooler." not in key}
    misfits = {key for key, *_ in told["mismatched_keys"] if key not in heads}
    refuse_damaged(name, path, model, ((lacking, "lacks"), (misfits, "has another shape of")))
    fresh = heads & ({*told["missing_keys"]} | {key for key, *_ in told["mismatched_keys"]})
    return model, not fresh


def _normalisation(path: Path | None, config: PretrainedConfig, mean, std) -> dict:
    """The size of pictures, and the mean and standard deviation of their colours: as given, the folder's, or a half."""
    file = None if path is None else path / "preprocessor_config.json"
    said = json.loads(file.read_text()) if file is not None and file.is_file() else {}
    theirs = {ours: said.get(key, [0.5, 0.5, 0.5]) for key, ours in FORMS.items()}
    return {"image_size": config.image_size, "mean": list(mean or theirs["mean"]), "std": list(std or theirs["std"])}


def tokenizer(source: Mapping) -> PreTrainedTokenizerFast:
    """The tokenizer of a model by its ``recombine_source``; a random model without a folder reads bytes."""
    loaded = read_tokenizer(
        source | {"id": source["name"], "tag": None, "revision": source["revision"] or "main"}, WAYS
    )
    if loaded is None:
        longest = source.get("max_position_embeddings", 512)
        return causal_lm.byte_tokenizer() if source["task"] == "lm" else encoders.byte_tokenizer(longest)
    if loaded.pad_token is None:  # what is padded is masked
        loaded.pad_token = loaded.eos_token
    return loaded
