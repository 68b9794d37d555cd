"""Run as `python -I -S without_recombine.py PACKAGES FOLDER ...`: loads exported folders, prints digests of logits.

PACKAGES is the folder of installed packages. Without -S, Python would follow the links there to what is installed for
development, recombine among them. Each folder is called image, sequence or causal. The last line is JSON: the digests
by that name.
"""

import hashlib
import json
import sys
from importlib.util import find_spec
from pathlib import Path

sys.path.append(sys.argv[1])

import torch  # noqa: E402

assert find_spec("recombine") is None, "recombine can be imported here: this shows nothing"
if find_spec("torchvision"):  # beside a torch for CPUs only it does not import without this, whoever asks
    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

AUTO = {
    "image": AutoModelForImageClassification,
    "sequence": AutoModelForSequenceClassification,
    "causal": AutoModelForCausalLM,
}
found = {}
for folder in map(Path, sys.argv[2:]):
    model = AUTO[folder.name].from_pretrained(folder, trust_remote_code=True)
    for p in model.parameters():
        p.data = p.data.clone()  # in a mapped file it begins anywhere, and MKL rounds a product with one row by that
    with torch.no_grad():
        if folder.name == "image":
            logits = model(torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)).logits
        else:
            x = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)("a few words", return_tensors="pt")
            logits = model(input_ids=x["input_ids"], attention_mask=x["attention_mask"]).logits
    found[folder.name] = hashlib.sha256(logits.numpy().tobytes()).hexdigest()
assert "recombine" not in sys.modules
print(json.dumps(found))
