"""Run as `python -I fresh.py FOLDER` in an environment without recombine: loads exported folders, compares outputs.

FOLDER holds cases.json (name, kind and folder of every export, which inputs it is given), absent.json (what must not
be importable here), and inputs and expected outputs as safetensors. The last line is JSON: the largest difference of
every case, or what went wrong.
"""

import json
import sys
import traceback
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(sys.argv[1])
there = [name for name in json.loads((ROOT / "absent.json").read_text()) if find_spec(name) is not None]
assert not there, f"can be imported here: {there}"

place = find_spec("torchvision").submodule_search_locations[0]
try:
    torch.ops.load_library(next(Path(place).glob("_C*.so")))
except OSError:  # beside a torch for CPUs only it does not import without this, whoever asks
    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import transformers  # noqa: E402

AUTO = {
    "image": transformers.AutoModelForImageClassification,
    "words": transformers.AutoModelForSequenceClassification,
    "causal": transformers.AutoModelForCausalLM,
}


def hf(folder: Path, reads: str, inputs: dict) -> torch.Tensor:
    """A folder with its own code."""
    model = AUTO[reads].from_pretrained(folder, trust_remote_code=True)
    if reads != "image":
        tokens = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)("a few words")
        assert tokens["input_ids"] == load_file(ROOT / f"{reads}.safetensors")["tokens"].tolist()
    if reads == "causal":
        ids = inputs["input_ids"][:1]
        new = model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=True, pad_token_id=0)
        assert torch.equal(new, load_file(ROOT / f"{reads}.safetensors")["generated"])
    return model(**inputs).logits


def dense(folder: Path, reads: str, inputs: dict) -> torch.Tensor:
    """A merged folder."""
    if reads == "image":
        import timm

        return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(inputs["pixel_values"])
    return AUTO[reads].from_pretrained(folder)(**inputs).logits


def lora(folder: Path, reads: str, inputs: dict) -> torch.Tensor:
    """An adapter on the plain model beside it."""
    import peft

    base = AUTO[reads].from_pretrained(folder.with_name(f"{folder.name}-base"))
    return peft.PeftModel.from_pretrained(base, folder)(**inputs).logits


def torch_(folder: Path, reads: str, inputs: dict) -> torch.Tensor:
    """A program of torch.export."""
    return torch.export.load(folder / "model.pt2").module()(**inputs)


def onnx(folder: Path, reads: str, inputs: dict) -> torch.Tensor:
    """A graph for ONNX Runtime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / "model.onnx")
    (output,) = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    return torch.from_numpy(output)


def openvino(folder: Path, reads: str, inputs: dict) -> torch.Tensor:
    """A graph for OpenVINO, in float32 also where the processor knows bfloat16."""
    import openvino

    model = openvino.compile_model(folder / "openvino_model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return torch.from_numpy(model({name: tensor.numpy() for name, tensor in inputs.items()})[0])


KINDS = {"hf": hf, "dense": dense, "lora": lora, "torch": torch_, "onnx": onnx, "openvino": openvino}
found = {}
for name, (kind, reads) in json.loads((ROOT / "cases.json").read_text()).items():
    inputs = load_file(ROOT / f"{reads}.safetensors")
    expected = inputs.pop("expected")
    inputs = {key: tensor for key, tensor in inputs.items() if key not in ("tokens", "generated")}
    described = ROOT / name / "inputs.json"
    if described.is_file():
        assert {*json.loads(described.read_text())["inputs"]} == {*inputs}
    try:
        with torch.no_grad():
            found[name] = float((KINDS[kind](ROOT / name, reads, inputs) - expected).abs().max())
    except Exception:
        found[name] = traceback.format_exc()
assert "recombine" not in sys.modules
print(json.dumps(found))
