"""The model card of an exported folder: README.md."""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from recombine.core.account import MIB, Account, count
from recombine.export.hf import class_name, task_class

GRAPHS = {  # what lies in a folder that holds one graph, and what it needs
    "torch": ["`model.pt2`: one graph of torch.export. inputs.json names its inputs.", "Needed: torch."],
    "onnx": ["`model.onnx`: one graph. inputs.json names its inputs.", "Needed: onnxruntime."],
    "openvino": ["`openvino_model.xml` and `.bin`: one graph. inputs.json names its inputs.", "Needed: openvino."],
}
LOAD = {
    "torch": ["import torch", "", 'model = torch.export.load("this/folder/model.pt2").module()'],
    "onnx": ["import onnxruntime", "", 'model = onnxruntime.InferenceSession("this/folder/model.onnx")'],
    "openvino": ["import openvino", "", 'model = openvino.compile_model("this/folder/openvino_model.xml", "CPU")'],
}


def card(model: nn.Module, to: str, tokenizer: bool, run: Mapping[str, Any] | None) -> str:
    """The text of the card.

    Args:
        to: the format.
        tokenizer: the folder holds one.
        run: the result.json of the run that made the model; None: it was made by hand.
    """
    record = model.recombined
    source = (getattr(model, "recombine_source", None) or {}).get("name") or record_name(model)
    home, dense = library_of(model), to == "dense"
    licence = (getattr(model, "pretrained_cfg", None) or {}).get("license")
    lines = [
        "---",
        f"library_name: {library(to, home)}",
        *([f"license: {licence}"] if licence else []),
        "tags: [recombine]",
        "---",
        f"# {source}, recombined by {' and '.join(step.method for step in record.steps)}",
        "",
        *(GRAPHS[to] if to in GRAPHS else plain(home, dense)),
        "",
        *loading(model, home, to, tokenizer),
        *([] if dense else counts(record, count(model), next(model.parameters()).dtype)),
        "## Method",
        "",
        *(
            f"- {step.method}: {', '.join(f'{k}={json.dumps(v)}' for k, v in step.fields.items())}"
            for step in record.steps
        ),
        "",
        "## Licence",
        "",
        f"Of the pretrained weights: {licence}."
        if licence
        else "That of the pretrained weights; it is not noted here.",
        *(of_run(run) if run else []),
    ]
    return "\n".join(lines) + "\n"


def library(to: str, home: str) -> str:
    """The library that loads the folder, as model hubs call it."""
    if to in GRAPHS:
        return "pytorch" if to == "torch" else to
    return home if to == "dense" else "transformers"


def plain(home: str, dense: bool) -> list[str]:
    """What the folder of a model is, and needs."""
    what = "The code in this folder builds the compressed model. recombine is not needed."
    more = {home} if dense else {"transformers", home}
    needed = ["torch", "safetensors", *sorted(more, reverse=True)]
    return ["Merged: dense." if dense else what, f"Needed: {', '.join(needed)}."]


def loading(model: nn.Module, home: str, to: str, tokenizer: bool) -> list[str]:
    """How the folder is loaded."""
    trust = ", trust_remote_code=True" if to == "hf" else ""
    if to in GRAPHS:
        load = LOAD[to]
    elif home == "diffusers":
        load = ["from diffusers import UNet2DConditionModel", ""]
        load += ['unet = UNet2DConditionModel.from_pretrained("this/folder", subfolder="unet")']
    elif home == "timm" and to == "dense":
        load = ["import timm", "", 'model = timm.create_model("local-dir:this/folder", pretrained=True)']
    else:
        auto = task_class(class_name(model, home == "timm"))
        load = [f"from transformers import {auto}", "", f'model = {auto}.from_pretrained("this/folder"{trust})']
    more = (
        ["", f'Its tokenizer: `transformers.AutoTokenizer.from_pretrained("this/folder"{trust})`.'] if tokenizer else []
    )
    return ["```python", *load, "```", *more, ""]


def library_of(model: nn.Module) -> str:
    """Where the model comes from: diffusers, timm or transformers."""
    if (getattr(model, "recombine_source", None) or {}).get("library") == "diffusers":
        return "diffusers"
    return "timm" if hasattr(model, "pretrained_cfg") else "transformers"


def record_name(model: nn.Module) -> str:
    """What the model is called, where no configuration of recombine made it."""
    return (getattr(model, "pretrained_cfg", None) or {}).get("architecture") or type(model).__name__


def counts(record: Any, account: Account, dtype: torch.dtype) -> list[str]:
    """The table of sizes."""
    return [
        "| | |",
        "|---|---|",
        f"| parameters | {account.stored:,} of {record.total:,} ({account.retained_total:.1%}) |",
        f"| in the {len(record.targets)} rewritten layers | {account.retained:.1%} of their weights |",
        f"| weights | {account.bytes_weights / MIB:.1f} MiB in {str(dtype).removeprefix('torch.')} |",
        "",
    ]


def of_run(run: Mapping[str, Any]) -> list[str]:
    """How it was trained, what it scored, and on what."""
    data = run["data"]
    scores = [
        f"| {part} | {name} | {value:.4g} |"
        for part in ("val", "test")
        for name, value in run.get(part, {}).items()
        if value is not None
    ]
    return [
        "",
        "## Training",
        "",
        f"    {run['command']}",
        "",
        f"Data: {data.get('title') or data['name']}. {data.get('licence', '')}".rstrip(),
        *(["", "| split | score | value |", "|---|---|---|", *scores] if scores else []),
    ]
