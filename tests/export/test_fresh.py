"""Every kind of export, loaded in an environment of its own, without recombine.

The environment is a venv without pip. Its site-packages hold links to exactly what is wanted of this environment:
torch, transformers, safetensors, timm with torchvision, onnxruntime, openvino, peft, and what these require. The
process there asserts that nothing else can be imported. (pip needs minutes for torch alone. `-m full` installs the same
versions with pip instead, from its index.)
"""

import copy
import json
import os
import subprocess
import sys
import sysconfig
from importlib.metadata import distribution, distributions
from importlib.util import find_spec
from pathlib import Path

import pytest
import timm
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from safetensors.torch import save_file
from torch import nn

import recombine
from helpers import before_openvino, config
from recombine import models
from recombine.export.folder import FORMATS

WANTED = ["torch", "transformers", "safetensors", "timm", "torchvision", "peft"]
WANTED += [extra for extra in ("onnxruntime", "openvino") if find_spec(extra)]
SCRIPT = Path(__file__).with_name("fresh.py")
CASES = {f"{kind}-{reads}": (kind, reads) for kind in ("hf", "torch", "onnx", "openvino")
         for reads in ("image", "words", "causal")}  # fmt: skip
CASES |= {"dense-image": ("dense", "image"), "dense-causal": ("dense", "causal"), "lora-causal": ("lora", "causal")}


def missing(kind: str) -> list[str]:
    """Packages of an extra that a kind needs and that are not installed."""
    return [package for package in FORMATS[kind][1] if find_spec(package) is None]


pytestmark = pytest.mark.export


def closure(*names: str) -> dict[str, str]:
    """Version by name of these packages and of all that they require, without extras."""
    found, todo = {}, [*names]
    while todo:
        if (name := canonicalize_name(todo.pop())) in found:
            continue
        package = distribution(name)
        found[name] = package.version
        wanted = (Requirement(line) for line in package.requires or ())
        todo += [each.name for each in wanted if not each.marker or each.marker.evaluate({"extra": ""})]
    return found


def tops(name: str) -> set[str]:
    """What a package has put into site-packages."""
    return {file.parts[0] for file in distribution(name).files} - {"..", "__pycache__"}


def linked(folder: Path) -> str:
    """The Python of a venv whose packages are links to those of this environment."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for top in set().union(*map(tops, closure(*WANTED))):
        (site / top).symlink_to(Path(sysconfig.get_path("purelib"), top))
    return str(folder / "bin" / "python")


def installed(folder: Path) -> str:
    """The Python of a venv into which pip has put the same versions."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pins = [f"{name}=={version.partition('+')[0]}" for name, version in closure(*WANTED).items()]
    subprocess.run([folder / "bin" / "pip", "install", "--quiet", "--no-deps", *pins], check=True)
    return str(folder / "bin" / "python")


def recombined(plain: nn.Module, method: recombine.Method, budget: str | None = None) -> nn.Module:
    model = recombine.apply(plain, method, budget).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for p in filter(lambda p: p.requires_grad, model.parameters()):
            p.add_(0.02 * torch.randn_like(p))
    return model


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """The folders of all cases; beside them what goes in, what comes out, and what must not be importable."""
    before_openvino()
    root = tmp_path_factory.mktemp("exported")
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4, "num_classes": 5}
    vit = timm.create_model("vit_tiny_patch16_224", **sizes)
    llama = models.build(**config("tiny_llama", num_hidden_layers=1))
    made = {
        "image": recombined(vit, recombine.Crisp(chunk=8), "retained_50"),
        "words": recombined(
            models.build(**config("tiny_bert", num_hidden_layers=1, num_classes=3, pooling="mean")), recombine.Cersa()
        ),
        "causal": recombined(copy.deepcopy(llama), recombine.Crisp(chunk=8, basis_rank=4)),
    }
    cases = {name: (kind, reads) for name, (kind, reads) in CASES.items() if not missing(kind)}
    for name, (kind, reads) in cases.items():
        recombine.export(made[reads], root / name, kind, **({"base": llama} if kind == "lora" else {}))
    llama.save_pretrained(root / "lora-causal-base")
    for reads, model in made.items():
        if reads == "image":
            inputs = {"pixel_values": torch.randn(5, 3, 32, 32)}
        else:
            ids = torch.randint(1, 100, (4, 7))
            inputs = {"input_ids": ids, "attention_mask": (torch.arange(7) < torch.tensor([[7], [5], [3], [7]])).long()}
        more = {}
        with torch.no_grad():
            output = model(*inputs.values()) if reads == "image" else model(**inputs).logits
            if reads != "image":
                tokens = models.tokenizer(model.recombine_source)("a few words")["input_ids"]
                more["tokens"] = torch.tensor(tokens)
            if reads == "causal":
                options = {"max_new_tokens": 6, "do_sample": False, "use_cache": False, "pad_token_id": 0}
                more["generated"] = model.generate(inputs["input_ids"][:1], **options)
        save_file(inputs | more | {"expected": output.contiguous()}, root / f"{reads}.safetensors")
    (root / "cases.json").write_text(json.dumps(cases))
    return root


@pytest.fixture(scope="module", params=["links", pytest.param("pip", marks=pytest.mark.full)])
def differences(request, exported, tmp_path_factory) -> dict:
    """What the process in the environment has found, by case."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    python = linked(folder) if request.param == "links" else installed(folder)
    known = closure(*WANTED)
    present = set().union(*map(tops, known)) | {"setuptools", "pkg_resources", "_distutils_hack", "pip"}
    others = {d.name for d in distributions() if canonicalize_name(d.name) not in known}
    names = {Path(top).name.partition(".")[0] for other in others for top in tops(other) - present}
    absent = sorted(
        {name for name in names - {"test"} if name.isidentifier()}  # Python has a module of that name
        | {"recombine", "run", "hydra", "lightning", "onnx"}
    )
    (exported / "absent.json").write_text(json.dumps(absent))
    environment = {"HF_HOME": str(exported / "hub"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": os.defpath}
    done = subprocess.run(
        [python, "-I", SCRIPT, exported], cwd=exported, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", CASES)
def test_it_loads_and_says_the_same(name, differences):
    """Bit for bit where the code is our own, and else to rounding."""
    if missing(CASES[name][0]):
        pytest.skip(f"needs pip install 'recombine[{CASES[name][0]}]'")
    found = differences[name]
    assert not isinstance(found, str), found
    assert found == 0 if CASES[name][0] == "hf" else found < 1e-4
