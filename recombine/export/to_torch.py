"""Writes a recombined model as a program of torch.export, which `torch.export.load` runs."""

from pathlib import Path

import torch
from torch import nn

from recombine.export.graph import Traced, compare, describe

FILE = "model.pt2"


def write(model: nn.Module, traced: Traced, folder: Path) -> None:
    """Writes model.pt2 and inputs.json into a folder that is there, once the program has been compared.

    Raises:
        UsageError: as in `graph.compare`.
    """
    program = traced.program.module()
    with torch.no_grad():
        error = compare(lambda inputs: program(**inputs), traced, "the program")
    torch.export.save(traced.program, folder / FILE)
    describe(model, traced, folder, FILE, error)
