"""What every format takes on the disk, and how far its outputs are from the model's: the table of docs/export.md.

    python scripts/export_sizes.py               DINOv2 ViT-S/14 at 70 px with its packaged weights, half of the layers

Every folder is loaded as its reader would load it. Bytes are of the weights' files; `count` is what `recombine.count`
says.
"""

import copy
import sys
import tempfile
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

import recombine
from recombine import models
from recombine.runtime import conf

MIB = 2**20
FORMATS = ("difference", "whole", "hf", "torch", "onnx", "openvino", "dense", "lora")
MADE = {  # what is done to the model
    "SVD, half": recombine.Svd(),
    "SVD with pivots, half": recombine.Svd(factor="pivot"),
    "CRISP, half": recombine.Crisp(chunk=128, group_size=1),
}
WEIGHTS = (".safetensors", ".pt2", ".onnx", ".data", ".bin", ".difference", ".whole")  # ends of files that hold some


def read(folder: Path, to: str, base: nn.Module, x: Tensor) -> Tensor:
    """The outputs (B, classes) of what lies in a folder, or of a file of recombine's own."""
    if to == "difference":
        return recombine.load(folder / f"m.{to}", copy.deepcopy(base)).eval()(x)
    if to == "whole":
        return recombine.load(folder / f"m.{to}").eval()(x)
    if to == "hf":
        import transformers

        found = transformers.AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
        return found.eval()(pixel_values=x).logits
    if to == "dense":
        import timm

        return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(x)
    if to == "lora":
        import peft

        return peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()(x)
    if to == "torch":
        return torch.export.load(folder / "model.pt2").module()(pixel_values=x)
    if to == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(folder / "model.onnx")
        return torch.from_numpy(session.run(None, {"pixel_values": x.numpy()})[0])
    import openvino

    graph = openvino.compile_model(folder / "openvino_model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return torch.from_numpy(graph({"pixel_values": x.numpy()})[0])


def write(model: nn.Module, folder: Path, to: str, base: nn.Module) -> None:
    """Writes the model in a format."""
    if to in ("difference", "whole"):
        folder.mkdir()
        recombine.save(model, folder / f"m.{to}", whole=to == "whole")
    else:
        recombine.export(model, folder, to, **({"base": base} if to == "lora" else {}))


def cells(model: nn.Module, base: nn.Module, x: Tensor) -> list[str]:
    """A cell a format: its MiB and the largest difference of an output, or a dash where it is refused."""
    found, wanted = [], model(x)
    with tempfile.TemporaryDirectory() as scratch:
        for to in FORMATS:
            folder = Path(scratch) / to
            try:
                write(model, folder, to, base)
            except recombine.UsageError as refusal:
                print(f"{to}: {refusal}", file=sys.stderr)
                found.append("—")
                continue
            size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and p.suffix in WEIGHTS)
            apart = (read(folder, to, base, x) - wanted).abs().max().item()
            found.append(f"{size / MIB:.1f}, {apart:.0e}" if apart else f"{size / MIB:.1f}, 0")
    return found


@torch.no_grad()
def main() -> None:
    """Prints the table."""
    torch.manual_seed(0)
    config = OmegaConf.to_container(conf.merged("model", "dinov2_s14"))
    base = models.build(**config | {"image_size": 70, "num_classes": 16}).eval()
    x = torch.randn(4, 3, 70, 70)
    print("| model | count | " + " | ".join(FORMATS) + " |\n" + "|---" * (len(FORMATS) + 2) + "|")
    for name, method in MADE.items():
        model = recombine.apply(copy.deepcopy(base), method, "retained_50").eval()
        size = recombine.count(model).bytes_weights / MIB
        print(f"| {name} | {size:.1f} | " + " | ".join(cells(model.eval(), base, x)) + " |", flush=True)


if __name__ == "__main__":
    main()
