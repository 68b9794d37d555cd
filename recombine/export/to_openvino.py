"""Writes a recombined model as OpenVINO's own files, compared with OpenVINO."""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from recombine.errors import UsageError
from recombine.export import to_onnx
from recombine.export.graph import Traced, compare, describe, short

FILE = "openvino_model.xml"


def write(model: nn.Module, traced: Traced, folder: Path) -> None:
    """Writes openvino_model.xml, its .bin and inputs.json into a folder that is there, once OpenVINO has run it.

    The graph goes through ONNX. `openvino.convert_model` would multiply out what several layers share.

    Raises:
        UsageError: as in `to_onnx.convert` and `graph.compare`, or OpenVINO refuses the graph.
    """
    with TemporaryDirectory(dir=folder) as aside:
        to_onnx.convert(traced, Path(aside) / to_onnx.FILE)
        store(Path(aside) / to_onnx.FILE, folder / FILE)
    describe(model, traced, folder, FILE, compare(runner(folder / FILE), traced, "OpenVINO"))


def store(source: Path, path: Path) -> None:
    """Writes an ONNX file as OpenVINO's .xml and .bin, in float32.

    Raises:
        UsageError: OpenVINO refuses the graph.
    """
    import openvino

    try:
        graph = openvino.Core().read_model(source)
    except RuntimeError as error:
        why = f"OpenVINO says {short(error)}"
        raise UsageError(f"cannot be exported: {why}; export it as hf, dense or onnx") from error
    openvino.save_model(graph, path, compress_to_fp16=False)


def runner(path: Path):
    """What runs the file: inputs by name -> the output. In float32: on some processors bfloat16 would be taken."""
    import openvino

    compiled = openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def run(inputs: dict[str, Tensor]) -> Tensor:
        return torch.from_numpy(compiled({name: tensor.numpy() for name, tensor in inputs.items()})[0])

    return run
