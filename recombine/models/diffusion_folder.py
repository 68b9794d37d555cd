"""The folder that a text-to-image model lies in.

    unet/ vae/ text_encoder/ tokenizer/ scheduler/      config.json and weights each, as diffusers saves a pipeline

A folder without a vae works on pixels. One without a text_encoder takes model.text=minilm, the packaged MiniLM.
"""

import inspect
import json
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import nn

from recombine.errors import UsageError, first_line
from recombine.models.hf_folder import UNREADABLE, refuse_damaged
from recombine.models.weights import hub_folder, silence
from recombine.runtime.assets import cache_dir

FOLDERS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
WAYS = "connect once, or give model.checkpoint=FOLDER, or take model=tiny_diffusion"
TRAINED_HERE = {"tiny_diffusion": "python scripts/pretrain_tiny_diffusion.py"}  # model -> what makes its weights


def folder(
    name: str, *, id: str | None, revision: str | None, pretrained: bool, checkpoint: str | Path | None
) -> Path | None:
    """The folder of a model: its checkpoint, the hub's, or the one trained here; None: a random model.

    Raises:
        UsageError: there is none.
    """
    if checkpoint is not None:
        if not (Path(checkpoint) / "unet" / "config.json").is_file():
            raise UsageError(
                f"model.checkpoint={checkpoint} holds no unet/config.json: give a folder that diffusers saved"
            )
        return Path(checkpoint)
    if not pretrained:
        return None
    if id is not None:
        return hub_folder(name, id, revision, pipeline_files, WAYS)
    if name not in TRAINED_HERE:
        fix = "set model.checkpoint=FOLDER, or model.pretrained=false for random ones"
        raise UsageError(f"model.pretrained=true: nothing says where the weights of {name} are; {fix}")
    path = trained_here(name)
    if not (path / "unet" / "config.json").is_file():
        fix = f"make them with `{TRAINED_HERE[name]}`, or give model.checkpoint=FOLDER or model.pretrained=false"
        raise UsageError(f"model {name}: its weights are not in {path}: {fix}")
    return path


def trained_here(name: str) -> Path:
    """The folder of weights that a script of this project makes."""
    return cache_dir() / "weights" / name


def pipeline_files(names: Sequence[str]) -> list[str]:
    """Of a repository the configurations, the tokenizer, and each part's weights in one form, safetensors if any."""
    found = [name for name in names if name == "model_index.json"]
    for part in FOLDERS:
        mine = [name for name in names if name.startswith(f"{part}/")]
        found += [name for name in mine if name.endswith((".json", ".txt", ".model"))]
        plain = [name for name in mine if not fnmatch(name, "*.fp16.*") and not fnmatch(name, "*.non_ema.*")]
        tensors = [name for name in plain if name.endswith(".safetensors")]
        found += tensors or [name for name in plain if name.endswith(".bin")]
    return found if "unet/config.json" in names else []


def read_config(path: Path, part: str) -> dict[str, Any]:
    """The configuration of a part of the folder, without the notes of the library that wrote it.

    Raises:
        UsageError: it cannot be read.
    """
    file = path / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    try:
        return {key: value for key, value in json.loads(file.read_text()).items() if not key.startswith("_")}
    except (OSError, ValueError, AttributeError) as error:
        raise UsageError(f"{file} cannot be read ({first_line(error)}); complete the folder") from error


def read_unet(name: str, path: Path, cls: type[nn.Module]) -> nn.Module:
    """The folder's UNet in float32, every tensor of it.

    Raises:
        UsageError: it cannot be read, or lacks a tensor.
    """
    with silence():
        try:
            unet, told = cls.from_pretrained(
                path / "unet",
                torch_dtype=torch.float32,
                local_files_only=True,
                low_cpu_mem_usage=False,
                output_loading_info=True,
            )
        except UNREADABLE as error:
            raise UsageError(f"model {name}: {path}/unet cannot be read ({first_line(error)}); replace it") from error
    problems = ((set(told["missing_keys"]), "lacks"), (set(told["unexpected_keys"]), "has too much:"))
    refuse_damaged(name, path / "unet", unet, problems)
    return unet


def written(unet: nn.Module | None, cls: type[nn.Module]) -> dict[str, Any]:
    """The arguments of a UNet that are not the class's own, as plain values; None: all that there are."""
    own = {p.name: p.default for p in inspect.signature(cls.__init__).parameters.values() if p.name != "self"}
    if unet is None:
        return own
    used = {key: unet.config[key] for key in own if unet.config[key] != own[key]}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in used.items()}


def frozen(where: Path, load: Callable[..., nn.Module]) -> nn.Module:
    """A part out of its folder, in float32, for inference.

    Raises:
        UsageError: it cannot be read.
    """
    try:
        with silence():
            return load(where, torch_dtype=torch.float32, local_files_only=True).eval().requires_grad_(False)
    except UNREADABLE as error:
        raise UsageError(f"{where} cannot be read ({first_line(error)}); complete the folder") from error
