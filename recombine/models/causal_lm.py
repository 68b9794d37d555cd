"""Causal language models of the Llama architecture behind the same `build` as the others, each with its tokenizer.

smollm2_135m  SmolLM2-135M-Instruct (arXiv 2502.02737) out of a package
llama32_1b    meta-llama/Llama-3.2-1B, gated on the hub
llama2_7b     meta-llama/Llama-2-7b-hf (arXiv 2307.09288), gated on the hub
tiny_llama    random, over bytes

Weights, config.json and tokenizer lie in one folder: a local ``checkpoint``, the package (``tag: packaged``), or the
hub's ``id`` at its ``revision``. ``pretrained=False`` takes the sizes of the YAML and torch's current seed, so that
counts, FLOPs and speed of the gated models need no access.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from recombine.errors import UsageError, first_line
from recombine.models.allowed import config_values
from recombine.models.hf_folder import UNREADABLE, bytes_only, folder, read_tokenizer, refuse_damaged
from recombine.models.recompute import recompute
from recombine.models.weights import silence
from recombine.runtime.kinds import Name, Place

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
THEIRS = ("rope_parameters", "initializer_range")  # taken from the weights where there are any
SPECIAL = ("<unk>", "<s>", "</s>")  # of the byte tokenizer, before the 256 bytes
WAYS = "accept its licence on the hub and `hf auth login`, or model.checkpoint=FOLDER, or model=smollm2_135m"


def build(
    name: Name,
    *,
    arch: Name,
    id: Name | None = None,
    revision: Name | None = None,
    tag: Name | None = None,
    pretrained: bool = True,
    checkpoint: Place | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    gradient_checkpointing: bool = False,
    **sizes,
) -> nn.Module:
    """A LlamaForCausalLM; ``model.recombine_source`` says where it came from.

    Args:
        dtype: float32, bfloat16 or float16, of the stored weights.
        gradient_checkpointing: the backward pass computes each block again; only its input was kept.
        sizes: of LlamaConfig; pretrained weights must have them, but for THEIRS.
    """
    where = {"id": id, "revision": revision, "tag": tag, "pretrained": pretrained, "checkpoint": checkpoint}
    path = folder(name, WAYS, **where)
    config = configuration(name, sizes)
    if path is None:
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype])
    else:
        model = load(name, path, sizes, DTYPES[dtype])
    model.config.use_cache = False  # training needs no keys and values; generate() turns its cache on by itself
    if gradient_checkpointing:
        recompute(model, True)
    model.recombine_weights = path
    model.recombine_source = {
        "name": name,
        "library": "transformers",
        "arch": arch,
        **where,
        "checkpoint": None if checkpoint is None else str(checkpoint),
        "dtype": dtype,
        "gradient_checkpointing": gradient_checkpointing,
        **sizes,
    }
    return model.train()


def configuration(name: str, sizes: Mapping) -> LlamaConfig:
    """The LlamaConfig with these sizes.

    Raises:
        UsageError: LlamaConfig has no such key, or refuses its value.
    """
    config_values(LlamaConfig, sizes)
    try:
        config = LlamaConfig(**sizes)
        assert config.num_attention_heads % config.num_key_value_heads == 0, (
            f"num_key_value_heads={config.num_key_value_heads} must divide num_attention_heads="
            f"{config.num_attention_heads}"
        )
        return config
    except (StrictDataclassError, AssertionError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UsageError(f"model {name}: {' '.join(str(error).split())[:200]}; correct that key") from error


def load(name: str, path: Path, sizes: Mapping, dtype: torch.dtype) -> nn.Module:
    """The folder's weights, strictly: every tensor of the model and no other, all finite.

    Raises:
        UsageError: the folder cannot be read, or is of another model.
    """
    try:
        config = LlamaConfig.from_pretrained(path, local_files_only=True)
    except UNREADABLE as error:
        raise UsageError(
            f"model {name}: {path}/config.json cannot be read ({first_line(error)}); replace it"
        ) from error
    for key, value in sizes.items():
        if key not in THEIRS and getattr(config, key, None) != value:
            has = f"{key}={getattr(config, key, None)}"
            raise UsageError(f"model.{key}={value}: the weights in {path} have {has}; set model.{has} or take others")
    try:
        with silence():
            model, told = LlamaForCausalLM.from_pretrained(
                path, dtype=dtype, local_files_only=True, output_loading_info=True
            )
    except UNREADABLE as error:
        reason = first_line(error)
        raise UsageError(f"model {name}: the weights in {path} cannot be read ({reason}); replace the file") from error
    surplus = {key for key in told["unexpected_keys"] if not key.endswith("rotary_emb.inv_freq")}
    refuse_damaged(name, path, model, ((told["missing_keys"], "lacks"), (surplus, "has too much:")))
    return model


def tokenizer(source: Mapping) -> PreTrainedTokenizerFast:
    """The tokenizer of a model by its ``recombine_source``; a random model reads bytes."""
    loaded = read_tokenizer(source, WAYS) or byte_tokenizer()
    if loaded.pad_token is None:  # Llama has none; what is padded is masked
        loaded.pad_token = loaded.eos_token
    return loaded


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes are tokens 3 to 258, after <unk>, <s> and </s>."""
    unknown, begin, end = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=bytes_only(SPECIAL), unk_token=unknown, bos_token=begin, eos_token=end, pad_token=unknown
    )
