"""Writes a recombined model as the plain one that it computes: an ordinary folder, at the dense size."""

import logging
import shutil
from pathlib import Path

from torch import nn

from recombine.core.checkpoint import merged_copy
from recombine.errors import UsageError
from recombine.export.hf import plain_twin, require_same
from recombine.layers.packed import packed_in
from recombine.models import rebuild

log = logging.getLogger(__name__)


def write(model: nn.Module, folder: Path) -> Path:
    """Merges a copy and writes it into a folder that is there: what `from_pretrained`, or timm's "local-dir:", loads.

    Raises:
        UsageError: neither timm nor transformers builds the merged model.
    """
    if packed_in(model):
        log.warning('exported in float: a dense folder holds no packed weights; to="hf" keeps them')
    methods = " and ".join(step.method for step in model.recombined.steps)
    merged = merged_copy(model, folder).eval()
    if getattr(merged, "recombine_source", {}).get("library") == "diffusers":
        return draws(merged, folder)
    architecture = rebuild.architecture(merged)
    if architecture is None or type(merged).__module__.startswith("recombine."):
        raise UsageError(f'no other library has a {type(merged).__name__}; recombine.export(..., "hf") takes its code')
    twin, arguments = plain_twin(merged, architecture)
    tensors = dict(merged.named_parameters()) | {k: b for k, b in merged.named_buffers() if k in merged.state_dict()}
    require_same(merged, twin, tensors, methods)
    if architecture["library"] == "transformers":
        merged.save_pretrained(folder)
    else:
        from timm.models import save_for_hf

        more = {key: value for key, value in arguments["arguments"].items() if key != "num_classes"}
        save_for_hf(merged, folder, model_args=more, safe_serialization=True)
    for path in folder.glob("*.safetensors"):  # the libraries give it to its owner alone
        shutil.copymode(folder / "config.json", path)
    return folder


def draws(merged: nn.Module, folder: Path) -> Path:
    """Writes what was rewritten of a text-to-image model in diffusers' layout: its UNet, its text encoder if that
    trained, and its noise schedule. The other parts are as they were in the folder or repository that it came from.
    """
    for name, part in (("unet", merged.unet), ("text_encoder", getattr(merged, "text_encoder", None))):
        if part is not None:
            part.save_pretrained(folder / name, safe_serialization=True)
    merged.schedule.save_pretrained(folder / "scheduler")
    return folder
