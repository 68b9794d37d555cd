"""Packed weights in exported folders: small, and the same outputs."""

import json
import logging

import onnx
import pytest
import timm
import torch
from safetensors.torch import load_file

import recombine
from helpers import before_openvino
from recombine import Cersa, Crisp, Peft, Svd, UsageError, apply, count, export, quantize
from recombine.export import hf_parts

METHODS = {
    "plain": None,
    "svd": Svd(),
    "core": Svd(train_core=True),
    "crisp": Crisp(chunk=16),
    "cersa": Cersa(alpha=0.9, beta=0.5),
    "sharing": recombine.BasisSharing(),
    "lora": Peft(rank=2, options={"init_lora_weights": False}),
}


def model(method: str, bits: int = 4):
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 2, "num_classes": 5}
    made = timm.create_model("vit_tiny_patch16_224", **sizes)
    x = torch.randn(4, 3, 16, 16)
    if METHODS[method] is not None:
        apply(made, METHODS[method], losses=lambda: (made(x).square().mean() for _ in range(2)))
    return quantize(made, bits, 16).eval()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("method", METHODS)
def test_a_folder_keeps_them_and_computes_the_same(method, bits, tmp_path):
    from transformers import AutoModelForImageClassification

    packed, x = model(method, bits), torch.randn(3, 3, 16, 16)
    folder = export(packed, tmp_path / "hf")
    again = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        y, found = packed(x), again(pixel_values=x).logits
    assert torch.allclose(found, y, atol=1e-6)  # a core that stands apart, and a built weight, are summed otherwise
    assert torch.equal(found, y) or method not in ("plain", "svd", "lora")
    codes = sum(t.numel() for n, t in load_file(folder / "model.safetensors").items() if n.endswith("codes"))
    assert codes == sum(p.numel() for n, p in packed.named_parameters() if n.endswith("codes"))
    # beside a dense core (k, k) with zeros in it
    assert (folder / "model.safetensors").stat().st_size < 1.5 * count(packed).bytes_weights + 20_000


@pytest.mark.parametrize("to", ["torch", "onnx", "openvino"])
def test_a_graph_keeps_them(to, tmp_path):
    before_openvino()
    for package in {"onnx": ("onnxscript", "onnxruntime"), "openvino": ("openvino", "onnxscript")}.get(to, ()):
        pytest.importorskip(package, reason=f"needs pip install 'recombine[{to}]'")
    packed = model("plain")  # with matrices that are too large to be folded
    folder = export(packed, tmp_path / to, to)
    assert json.loads((folder / "inputs.json").read_text())["largest_difference"] < 1e-5
    if to == "onnx":
        weights = sum(len(tensor.raw_data) for tensor in onnx.load(folder / "model.onnx").graph.initializer)
    elif to == "openvino":
        weights = (folder / "openvino_model.bin").stat().st_size
    else:
        state = torch.export.load(folder / "model.pt2").state_dict
        weights = sum(tensor.nbytes for tensor in state.values())
    assert weights < 1.3 * count(packed).bytes_weights < 0.5 * 4 * count(packed).stored  # scales may be float32 there


def model_without_bits():
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 2, "num_classes": 5}
    return timm.create_model("vit_tiny_patch16_224", **sizes).eval()


def test_what_holds_none_says_so(tmp_path, caplog):
    packed, x = model("lora"), torch.randn(2, 3, 16, 16)
    with caplog.at_level(logging.WARNING):
        export(packed, tmp_path / "dense", "dense")
    assert [r.getMessage() for r in caplog.records if "exported in float" in r.getMessage()]
    with pytest.raises(UsageError, match="a LoRA cannot hold how packed weights were rounded"):
        export(packed, tmp_path / "lora", "lora", base=model_without_bits())
    with torch.no_grad():
        assert torch.isfinite(packed(x)).all()  # the model is as it was
    caplog.clear()
    folded = apply(model_without_bits(), Peft(rank=2, options={"use_dora": True}))
    with caplog.at_level(logging.WARNING):
        export(quantize(folded, 4, 16), tmp_path / "dora")
    assert "12 of 12 packed tensors are exported in float" in caplog.text


def test_small_scales_survive_half_precision_in_a_folder():
    layer = hf_parts.matrix(32, 16, 8, 8)
    layer.codes.random_(0, 255)
    layer.scale.fill_(1e-7)
    before = layer.value(torch.float32)
    assert torch.equal(layer.half().value(torch.float32), before) and layer.scale.dtype == torch.bfloat16


def test_a_packed_left_factor_with_a_bias_is_the_same_in_half(tmp_path):
    from transformers import AutoModelForImageClassification

    torch.manual_seed(0)
    packed, x = model("svd").bfloat16(), torch.randn(3, 3, 16, 16).bfloat16()
    again = AutoModelForImageClassification.from_pretrained(
        export(packed, tmp_path / "hf"), trust_remote_code=True, dtype="auto"
    )
    with torch.no_grad():
        assert torch.equal(again.eval()(pixel_values=x).logits, packed(x))
