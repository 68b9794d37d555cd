"""Models as one graph, random and tiny: what torch.export, ONNX Runtime and OpenVINO compute from the files, and what
is stored once."""

import copy
import json
import sys

import numpy as np
import onnx
import pytest
import timm
import torch
from torch import nn

import recombine
from helpers import before_openvino
from recombine.export import folder as folders
from recombine.export import graph, to_onnx, to_openvino, to_torch
from scripts.model_matrix import loss, output
from scripts.tiny_models import MODELS
from zoo import build

SIZES = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 96, "vocab_size": 64}
METHODS = {
    "svd": (recombine.Svd(), "retained_50"),
    "pivot": (recombine.Svd(factor="pivot"), "retained_50"),
    "crisp": (recombine.Crisp(chunk=8, group_size=2), "retained_50"),
    "cersa": (recombine.Cersa(), None),
    "lora": (recombine.Peft(rank=2, options={"init_lora_weights": False}), None),
    "jactus": (recombine.Jactus(), "retained_50"),
}


@pytest.fixture
def extras() -> None:
    """Skips where they are not installed."""
    before_openvino()
    for package, extra in (("onnxscript", "onnx"), ("onnxruntime", "onnx"), ("openvino", "openvino")):
        pytest.importorskip(package, reason=f"needs pip install 'recombine[{extra}]'")


def vit(depth: int = 1) -> nn.Module:
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 48, "depth": depth, "num_heads": 2, "num_classes": 5}
    return timm.create_model("vit_tiny_patch16_224", **sizes)


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(**SIZES, num_labels=5))


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=1))


def inputs(model: nn.Module, batch: int = 5, tokens: int = 4):
    if isinstance(model, timm.models.VisionTransformer):
        return torch.randn(batch, 3, 16, 16)
    mask = (torch.arange(tokens) < torch.randint(1, tokens + 1, (batch, 1))).long()
    return {"input_ids": torch.randint(0, 64, (batch, tokens)), "attention_mask": mask}


def made(plain: nn.Module, method: str) -> nn.Module:
    how, budget = METHODS[method]
    plain.eval()
    with torch.no_grad():
        for p in plain.parameters():
            p.mul_(torch.logspace(0.3, -1, p.shape[-1])) if p.ndim == 2 else p.add_(0.05 * torch.randn_like(p))
    calibration = lambda: [loss(plain, inputs(plain))]  # noqa: E731
    return recombine.apply(plain, copy.deepcopy(how), budget, calibration).eval()


def described(x) -> dict:
    """The inputs by the names that a graph gives them."""
    return x if isinstance(x, dict) else {"pixel_values": x}


PAIRS = [(build, method) for build in (vit, bert, llama) for method in METHODS]


@pytest.mark.parametrize("build, method", PAIRS)
def test_a_program_says_the_same_for_any_size(build, method, tmp_path):
    """Nothing of the model changes, and the file holds no more weights than the model."""
    torch.manual_seed(0)
    model = made(build(), method).train()
    before = {name: (module, module.training) for name, module in model.named_modules()}
    tensors = {name: (p, p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()}
    to_torch.write(model, graph.trace(model), tmp_path)
    assert before == {name: (module, module.training) for name, module in model.named_modules()}
    assert tensors == {name: (p, p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()}
    program = torch.export.load(tmp_path / "model.pt2")
    for sizes in ((1, 1), (5, 4), (2, 9)):
        x = inputs(model, *sizes)
        with torch.no_grad():
            found, expected = program.module()(**described(x)), output(model.eval(), x)
        assert torch.allclose(found, expected, atol=1e-5)
    floats = sum(p.numel() * p.element_size() for p in program.state_dict.values() if p.is_floating_point())
    assert floats <= 1.01 * recombine.count(model).bytes_weights
    assert b"/tests/export/" not in (tmp_path / "model.pt2").read_bytes()


# test_fresh.py has others
NEAR = [
    (vit, "svd"),
    (vit, "pivot"),
    (vit, "lora"),
    (vit, "jactus"),
    (bert, "svd"),
    (llama, "svd"),
]


@pytest.mark.parametrize(
    "build, method", [pair if pair in NEAR else pytest.param(*pair, marks=pytest.mark.full) for pair in PAIRS]
)
def test_onnx_and_openvino_say_the_same_for_any_size(extras, build, method, tmp_path):
    torch.manual_seed(0)
    model = made(build(), method)
    to_onnx.write(model, graph.trace(model), tmp_path)
    to_openvino.store(tmp_path / "model.onnx", tmp_path / "model.xml")
    for sizes in ((1, 1), (5, 4), (2, 9)):
        x = inputs(model, *sizes)
        with torch.no_grad():
            expected = output(model, x)
        for runner, file in ((to_onnx.runner, "model.onnx"), (to_openvino.runner, "model.xml")):
            assert torch.allclose(runner(tmp_path / file)(described(x)), expected, atol=1e-4), (file, sizes)
    stored = onnx.load(tmp_path / "model.onnx").graph
    axes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim] for value in stored.input
    }
    words = {name: ["batch", "sequence"] for name in ("input_ids", "attention_mask")}
    assert axes == ({"pixel_values": ["batch", 3, 16, 16]} if build is vit else words)
    assert [value.name for value in stored.output] == ["logits"]
    weights = sum(4 * int(np.prod(each.dims)) for each in stored.initializer if each.data_type == 1)
    size = recombine.count(model).bytes_weights
    integers = 1024 + sum(8 * buffer.numel() for buffer in model.buffers())  # tables of positions, and axes
    pivots = [layer.rank for layer in model.modules() if getattr(layer, "order", None) is not None]
    eyes = sum(4 * k * k for k in pivots if k * k <= to_onnx.FOLDED)  # so small an identity is folded
    assert weights <= 1.01 * size + eyes and (tmp_path / "model.bin").stat().st_size <= 1.01 * size + eyes + integers
    assert b"/tests/export/" not in (tmp_path / "model.onnx").read_bytes()


def test_what_layers_share_is_stored_once(extras, tmp_path):
    """Of two blocks that share their bases, with a layer that is built from its parts: in all three files."""
    torch.manual_seed(0)
    model = made(vit(depth=2), "crisp")
    bases = {id(m.basis): m.basis for m in model.modules() if hasattr(m, "basis")}
    assert len(bases) < len(model.recombined.targets)
    traced = graph.trace(model)
    to_torch.write(model, traced, tmp_path)
    to_onnx.write(model, traced, tmp_path)
    to_openvino.store(tmp_path / "model.onnx", tmp_path / "model.xml")

    def times(arrays) -> list[int]:
        """How often each basis is there, by its entries: also transposed, or with other axes."""
        known = [np.sort(np.asarray(array, np.float32).ravel()) for array in arrays]
        sought = [np.sort(basis.detach().numpy().ravel()) for basis in bases.values()]
        return [sum(len(a) == len(b) and bool((a == b).all()) for a in known) for b in sought]

    program = torch.export.load(tmp_path / "model.pt2")
    assert set(times(p.detach().numpy() for p in program.state_dict.values())) == {1}
    stored = onnx.load(tmp_path / "model.onnx").graph
    assert set(times(onnx.numpy_helper.to_array(each) for each in stored.initializer)) == {1}
    size = recombine.count(model).bytes_weights
    assert (tmp_path / "model.bin").stat().st_size <= 1.01 * size
    assert (tmp_path / "model.pt2").stat().st_size >= size  # the sizes are not of something else


def test_a_folder_is_whole(tmp_path):
    """What lies beside the graph, and that the command's formats are those of the runs."""
    from typing import get_args

    from recombine.runner.config import Format

    assert get_args(Format) == tuple(folders.FORMATS)
    model = made(vit(), "svd")
    recombine.export(model, tmp_path / "out", "torch")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"model.pt2", "inputs.json", "README.md", "preprocessor_config.json"}
    told = json.loads((tmp_path / "out/inputs.json").read_text())
    assert told["inputs"] == {"pixel_values": {"dtype": "float32", "shape": ["batch", 3, 16, 16]}}
    assert told["output"] == "logits" and told["largest_difference"] <= 1e-4
    assert json.loads((tmp_path / "out/preprocessor_config.json").read_text())["size"] == {"height": 16, "width": 16}
    assert "torch.export.load" in (tmp_path / "out/README.md").read_text()


def test_what_has_no_graph_is_refused_in_one_line(extras, tmp_path, monkeypatch):
    def line(model: nn.Module, to: str) -> str:
        with pytest.raises(recombine.UsageError) as error:
            recombine.export(model, tmp_path / "out", to)
        assert "\n" not in str(error.value) and not [*tmp_path.iterdir()]
        return str(error.value)

    for name in ("T5", "CLIP", "wav2vec 2.0"):
        model = recombine.apply(MODELS[name].fresh(), recombine.Svd(ratio=0.5))
        assert "cannot be exported as one graph" in line(model, "onnx")
    model = made(vit(), "svd")
    assert "weights are bfloat16" in line(copy.deepcopy(model).bfloat16(), "onnx")
    handle = model.blocks[0].mlp.fc1.register_forward_hook(lambda module, x, y: y + 1)
    assert "of the largest output away from the model" in line(model, "torch")  # a hook does not leave with a layer
    handle.remove()
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert "openvino is not installed; pip install 'recombine[openvino]'" in line(model, "openvino")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_compared_by_its_own_rounding(dtype, tmp_path):
    model = recombine.apply(build("tiny_vit").to(dtype), recombine.Svd(factor="pivot"), "retained_50").eval()
    assert (recombine.export(model, tmp_path / "graph", to="torch") / "inputs.json").is_file()
