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
    import openvino

    core = openvino.Core()
    with TemporaryDirectory(dir=folder) as aside:
        to_onnx.convert(traced, Path(aside) / to_onnx.FILE)
        try:
            read = core.read_model(Path(aside) / to_onnx.FILE)
        except RuntimeError as error:
            why = f"OpenVINO says {short(error)}"
            raise UsageError(f"cannot be exported: {why}; export it as hf, dense or onnx") from error
        openvino.save_model(read, folder / FILE, compress_to_fp16=False)
        del read  # it maps the file
    # in float32: on some processors OpenVINO would compute in bfloat16
    compiled = core.compile_model(folder / FILE, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def run(inputs: dict[str, Tensor]) -> Tensor:
        return torch.from_numpy(compiled({name: tensor.numpy() for name, tensor in inputs.items()})[0])

    describe(model, traced, folder, FILE, compare(run, traced, "OpenVINO"))
