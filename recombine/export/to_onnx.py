"""Writes a recombined model as ONNX, compared with ONNX Runtime."""

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from recombine.errors import UsageError
from recombine.export.graph import Traced, compare, describe, short

FILE = "model.onnx"
FOLDED = 1024  # elements: more are not folded, or a shared matrix would be stored once for each way it is read


def write(model: nn.Module, traced: Traced, folder: Path) -> None:
    """Writes model.onnx and inputs.json into a folder that is there, once ONNX Runtime has run it.

    Above 2 GB the weights lie in model.onnx.data.

    Raises:
        UsageError: as in `graph.compare`, or ONNX has no such operation.
    """
    convert(traced, folder / FILE)
    describe(model, traced, folder, FILE, compare(runner(folder / FILE), traced, "ONNX Runtime"))


def convert(traced: Traced, path: Path) -> None:
    """Writes the file.

    Raises:
        UsageError: the parameters are not float32, or ONNX has no such operation.
    """
    import onnxscript
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    if traced.dtype != torch.float32:
        name = str(traced.dtype).removeprefix("torch.")
        raise UsageError(
            f"cannot be exported: its weights are {name}, and this format is compared in float32; model.float()"
        )
    axes = {
        name: {i: axis for i, axis in enumerate(shape) if isinstance(axis, str)}
        for name, shape in traced.inputs.items()
    }
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                traced.program,
                input_names=[*traced.inputs],
                output_names=[traced.output],
                dynamic_shapes=axes,
                dynamo=True,
                optimize=False,
                verbose=False,
            )
            onnxscript.optimizer.optimize(program.model, input_size_limit=FOLDED, output_size_limit=FOLDED)
    except Exception as error:  # the exporter raises its own kinds, which it does not publish
        why = f"torch.onnx says {short(error)}"
        raise UsageError(f"cannot be exported: {why}; export it as hf, dense or torch") from error
    ClearMetadataAndDocStringPass()(program.model)  # paths of this machine
    program.save(path)


def runner(path: Path):
    """What runs the file: inputs by name -> the output."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(inputs: dict[str, Tensor]) -> Tensor:
        return torch.from_numpy(session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})[0])

    return run
