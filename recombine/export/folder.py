"""`export`: checks what it is given, and writes a folder that is there whole or not at all."""

import os
import shutil
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from recombine import models
from recombine.errors import UsageError, did_you_mean
from recombine.export.card import card
from recombine.models.wrappers import unwrapped
from recombine.runtime.tensor_file import path_of

FORMATS = {  # what is written, and the packages of an extra that it needs
    "hf": ("its own code, for transformers", ()),
    "dense": ("merged, a plain model", ()),
    "lora": ("a LoRA adapter of peft", ()),
    "torch": ("a program of torch.export", ()),
    "onnx": ("a graph, compared with ONNX Runtime", ("onnxscript", "onnxruntime")),
    "openvino": ("a graph, compared with OpenVINO", ("openvino", "onnxscript")),
}
GRAPHS = ("torch", "onnx", "openvino")  # traced for every batch size, by a module named to_...


def export(
    model: nn.Module,
    folder: str | Path,
    to: str = "hf",
    *,
    tokenizer: Any = None,
    run: Mapping[str, Any] | None = None,
    base: nn.Module | None = None,
    rank: int | None = None,
    energy: float | None = None,
) -> Path:
    """Writes a recombined model as a folder for other libraries; returns the folder. The model is not changed.

    Args:
        folder: where; it must not be there yet, or be empty.
        to: "hf": a compressed model with its own code, for `AutoModel....from_pretrained(..., trust_remote_code=True)`;
            "dense": merged, an ordinary model of transformers or timm; "lora": the difference to the pretrained
            weights, as an adapter of peft; "torch", "onnx", "openvino": one graph for every batch size, compared with
            the model when it is written.
        tokenizer: saved beside a text model; None: the one that belongs to it, where that is known.
        run: the result.json of the run that made the model, for the model card.
        base, rank, energy: of "lora", see `to_lora`.

    Raises:
        UsageError: the model is not recombined or cannot be written so, the format is unknown or lacks its extra, or
            the folder is full.
    """
    model, folder = unwrapped(model), check(folder, to)
    require_format(model, to)
    if not hasattr(model, "recombined"):
        raise UsageError(f"this {type(model).__name__} is not recombined: save it as its own library does")
    if to != "lora" and (base, rank, energy) != (None, None, None):
        raise UsageError(f'base, rank and energy are for to="lora", not for {to!r}: leave them out')
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        if to == "lora":
            import_module("recombine.export.lora").write(model, temporary, base, rank, energy)
        else:
            write(model, temporary, to)
            beside(model, temporary, to, tokenizer, run)
        os.replace(temporary, folder)
    except OSError as error:
        raise UsageError(
            f"{folder}: cannot be written ({error.strerror}); free some space or choose another"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def write(model: nn.Module, folder: Path, to: str) -> None:
    """Writes the weights, and what a format has beside them, by the module of that format.

    Raises:
        UsageError: the model cannot be written so.
    """
    if to in GRAPHS:
        traced = import_module("recombine.export.graph").trace(model)
        import_module(f"recombine.export.to_{to}").write(model, traced, folder)
    else:
        import_module(f"recombine.export.{to}").write(model, folder)


def check(folder: str | Path, to: str) -> Path:
    """The folder as a path, once it is free, and the format is known and installed.

    Raises:
        UsageError: it is not.
    """
    if to not in FORMATS:
        raise UsageError(
            f"to={to!r}: no such format; {did_you_mean(str(to), [*FORMATS])}choose from {', '.join(FORMATS)}"
        )
    require(to)
    folder = path_of(folder, "a folder; say export(model, FOLDER)").expanduser().absolute()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UsageError(f"{folder}: is there already; name a folder that is new or empty")
    return folder


def require_format(model: Any, to: str) -> None:
    """Refuses a format that cannot hold a model that draws.

    Raises:
        UsageError: names the one that can.
    """
    if getattr(model, "recombine_source", {}).get("library") == "diffusers" and to != "dense":
        raise UsageError(f"export to {to}: a model that draws is written as dense, which diffusers loads; say that")


def require(to: str) -> None:
    """Asks for the packages that a format needs.

    Raises:
        UsageError: one is not installed.
    """
    for package in FORMATS[to][1]:
        if find_spec(package) is None:
            raise UsageError(f"export to {to}: {package} is not installed; pip install 'recombine[{to}]'")


def beside(model: nn.Module, folder: Path, to: str, tokenizer: Any, run: Mapping[str, Any] | None) -> None:
    """Writes what lies beside the weights: the tokenizer and the model card."""
    source = getattr(model, "recombine_source", None)
    of_text = source is not None and source.get("library") != "diffusers" and models.modality(source) == "text"
    if tokenizer is None and of_text:
        tokenizer = models.tokenizer(source)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(card(model, to, tokenizer is not None, run), encoding="utf-8")


def save_pretrained(model: nn.Module, save_directory: str | Path, *args, **options) -> None:
    """What `save_pretrained` of a recombined transformers model does: `export` of kind "hf".

    Trainer names a `state_dict`, even if it is None: its checkpoints keep the model's own names, from which it resumes.
    As transformers' own, it writes into a folder that holds other files.

    Raises:
        UsageError: as in `export`, and for options that an exported folder does not know.
    """
    if "state_dict" in options:
        return type(model).save_pretrained(model, save_directory, *args, **options)
    if not options.pop("is_main_process", True):
        return None
    options.pop("safe_serialization", None)
    if args or options:
        given = ", ".join(options) or "further arguments"
        raise UsageError(f"save_pretrained({given}): a recombined model takes the folder alone; see recombine.export")
    place = Path(save_directory).expanduser().absolute()
    place.mkdir(parents=True, exist_ok=True)
    fresh = export(model, place / f".exported.{os.getpid()}", "hf")
    for path in fresh.iterdir():
        os.replace(path, place / path.name)
    fresh.rmdir()
    return None
