"""Folders that transformers loads: equal bit for bit, and small. (Where there is no recombine: test_fresh.py.)"""

import copy
import json
from pathlib import Path

import peft
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
)

import recombine
from recombine.export import hf_text
from scripts.model_matrix import output
from scripts.tiny_models import MODELS
from zoo import batch, build, losses, outputs

AUTO = {
    "tiny_vit": AutoModelForImageClassification,
    "tiny_swin": AutoModelForImageClassification,
    "tiny_deberta": AutoModelForSequenceClassification,
    "tiny_llama": AutoModelForCausalLM,
}
METHODS = {  # one for every kind of layer, and for every way that it takes in inference
    "factored": (recombine.Svd(), "retained_50"),
    "core": (recombine.Cersa(), None),
    "shared_right": (recombine.BasisSharing(whiten=False), "retained_50"),
    "pivot": (recombine.Svd(factor="pivot"), "retained_50"),
    "pivot_built": (recombine.Svd(factor="pivot", rank=44), None),
    "shared_pivot": (recombine.BasisSharing(whiten=False, factor="pivot"), "retained_50"),
    "shared_basis": (recombine.Crisp(chunk=8, group_size=2), "retained_50"),
    "shared_basis_structured": (recombine.Crisp(chunk=8, basis_rank=4), None),
    "shared_basis_temp": (
        recombine.Crisp(chunk=8, basis_rank=4, placement="temp", fit="mimicry", mimicry={"steps": 2}),
        None,
    ),
    "delta": (recombine.Rosa(), None),
    "entries": (recombine.Svft(), None),
    "scaled": (recombine.Ssf(), None),
    "lora": (recombine.Peft(), None),
}


def made(arch: str, method: str = "factored") -> nn.Module:
    """A recombined model in eval mode, moved away from where it started."""
    how, budget = METHODS[method]
    plain = build(arch)
    model = recombine.apply(plain, copy.deepcopy(how), budget, losses(plain))
    torch.manual_seed(3)
    with torch.no_grad():
        for p in filter(lambda p: p.requires_grad, model.parameters()):
            p.add_(0.02 * torch.randn_like(p))
    return model.eval()


def again(folder: Path, arch: str) -> nn.Module:
    """The exported model."""
    model, told = AUTO[arch].from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not any(told.values())
    return model


@torch.no_grad()
def logits(model: nn.Module, x) -> torch.Tensor:
    """Logits of either."""
    found = outputs(model, x)
    return found if isinstance(found, torch.Tensor) else found.logits


PAIRS = [(arch, method) for arch in ("tiny_vit", "tiny_llama") for method in METHODS]
PAIRS += [(arch, method) for arch in ("tiny_swin", "tiny_deberta") for method in ("factored", "shared_right", "pivot")]


@pytest.mark.parametrize("arch, method", PAIRS)
def test_the_exported_model_is_the_same(arch, method, tmp_path):
    """Logits bit for bit, with and without a part to build, and once more after transformers has saved it again."""
    model = made(arch, method)
    x, before = batch(model), {name: p.clone() for name, p in model.state_dict().items()}
    assert recombine.export(model, tmp_path / "hf") == tmp_path / "hf"
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    found = again(tmp_path / "hf", arch)
    assert torch.equal(logits(found, x), logits(model, x))
    found.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(again(tmp_path / "again", arch), x), logits(model, x))


CUT = {
    "modegpt": recombine.Modegpt(ratio=0.6),
    "modegpt by block": recombine.Modegpt(targets=("q", "k", "v", "o", "up", "down", "gate?"), allocation="blocks"),
    "dgmr": recombine.Dgmr(),
    "isomorphic": recombine.Isomorphic(width=False),
}


@pytest.mark.parametrize("adapter", [None, recombine.Peft(), recombine.Ssf()], ids=["alone", "lora", "ssf"])
@pytest.mark.parametrize("method", CUT)
@pytest.mark.parametrize("arch", ["tiny_vit", "tiny_swin", "tiny_llama"])
def test_a_cut_model_is_the_same(arch, method, adapter, tmp_path):
    """Smaller layers, narrower heads and selected turns; alone, and under an adapter."""
    if method == "isomorphic" and arch != "tiny_vit":
        pytest.skip("a ViT only")
    model = build(arch)
    recombine.apply(model, CUT[method], losses=losses(model))
    if adapter is not None:
        recombine.apply(model, adapter)
    recombine.export(model.eval(), tmp_path / "hf")
    x, found = batch(model), again(tmp_path / "hf", arch)
    assert torch.equal(logits(found, x), logits(model, x))
    assert sum(p.numel() for p in found.parameters()) == sum(p.numel() for p in model.parameters())
    found.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(again(tmp_path / "again", arch), x), logits(model, x))


def test_the_parts_are_linear_layers(tmp_path):
    """Adapters and quantisers find the factors, and a layer that they have changed is called, not read."""
    model = made("tiny_llama", "shared_basis")
    x = batch(model)
    found = again(recombine.export(model, tmp_path / "hf"), "tiny_llama")
    kinds = {type(m).__name__: m for m in found.modules()}
    assert kinds["SharedBasis"].built and {"mixer"} == {name for name, _ in kinds["SharedBasis"].named_children()}
    bases = [name for name in found.state_dict() if "shared_bases" in name]
    assert len(bases) == len({id(layer.basis) for layer in model.modules() if hasattr(layer, "basis")}) > 1
    options = {"r": 2, "target_modules": ["mixer", "shared_bases.0"], "init_lora_weights": False}
    adapted = peft.get_peft_model(copy.deepcopy(found), peft.LoraConfig(**options))
    assert not torch.allclose(logits(adapted, x), logits(model, x), atol=1e-3)
    outputs(adapted, x).square().mean().backward()
    assert all(p.grad.abs().sum() > 0 for p in adapted.parameters() if p.requires_grad)
    with adapted.disable_adapter():
        assert torch.allclose(logits(adapted, x), logits(model, x), atol=1e-4)
    after = logits(adapted, x)
    assert torch.allclose(logits(adapted.merge_and_unload(), x), after, atol=1e-4)
    rounded = torch.ao.quantization.quantize_dynamic(copy.deepcopy(found), {nn.Linear})
    assert type(rounded.shared_bases["0"]) is not nn.Linear
    error = (logits(rounded, x) - logits(model, x)).norm() / logits(model, x).norm()
    assert 0 < error < 0.2


def test_generation_with_a_cache(tmp_path):
    model = made("tiny_llama", "shared_basis_structured")
    found = again(recombine.export(model, tmp_path / "hf"), "tiny_llama")
    ids = torch.tensor([[5, 7, 11]])
    for cache in (True, False):
        tokens = found.generate(ids, max_new_tokens=8, do_sample=False, use_cache=cache, pad_token_id=0)
        expected = model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=False, pad_token_id=0)
        assert torch.equal(tokens, expected)
    assert found.config.use_cache


@pytest.mark.parametrize("method", ["factored", "shared_right", "shared_basis", "shared_basis_structured", "delta"])
def test_the_file_is_as_small_as_the_count(method, tmp_path):
    torch.manual_seed(0)
    plain = timm.create_model("vit_tiny_patch16_224", num_classes=10, img_size=32).eval()
    how, budget = METHODS[method]
    x = torch.randn(2, 3, 32, 32)
    images = lambda: iter([plain(x).logsumexp(1).mean()])  # noqa: E731
    model = recombine.apply(plain, copy.deepcopy(how), budget, images).eval()
    recombine.export(model, tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    assert file.stat().st_size <= 1.01 * recombine.count(model).bytes_weights
    assert file.stat().st_mode & 0o777 == (tmp_path / "hf" / "config.json").stat().st_mode & 0o777
    assert torch.equal(logits(again(file.parent, "tiny_vit"), x), logits(model, x))  # timm's note alone says what it is


def test_save_pretrained_exports(tmp_path):
    """Instead of a folder that loads with random weights; a copy of the model saves itself, a merged one as ever."""
    model = made("tiny_llama", "shared_right")
    x, twin = batch(model), copy.deepcopy(model)
    with torch.no_grad():
        twin.model.embed_tokens.weight.mul_(1.5)
    for each in (model, twin):
        each.save_pretrained(tmp_path / "hf")  # again into the same folder
        assert torch.equal(logits(again(tmp_path / "hf", "tiny_llama"), x), logits(each, x))
    with pytest.raises(recombine.UsageError, match="push_to_hub"):
        model.save_pretrained(tmp_path / "hf", push_to_hub=True)
    recombine.merge(model).save_pretrained(tmp_path / "plain")
    assert json.loads((tmp_path / "plain/config.json").read_text())["model_type"] == "llama"
    file = recombine.save(twin, tmp_path / "m", whole=True)
    recombine.load(file).save_pretrained(tmp_path / "loaded")
    assert AutoModel.from_pretrained(tmp_path / "loaded", trust_remote_code=True).shared_bases


def test_without_trust_nothing_loads(tmp_path):
    recombine.export(made("tiny_llama"), tmp_path / "hf")
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=False)


def test_the_card_says_what_it_is(tmp_path):
    model = made("tiny_vit")
    text = (recombine.export(model, tmp_path / "hf") / "README.md").read_text()
    account = recombine.count(model)
    assert f"{account.stored:,} of {model.recombined.total:,}" in text and "- Svd: targets=" in text
    assert "AutoModelForImageClassification.from_pretrained" in text and "## Training" not in text


def test_the_code_is_plain():
    """The part of every folder that is ours imports torch alone."""
    lines = "".join(hf_text.layers()).splitlines()
    imports = [line for line in lines if line.startswith(("import ", "from "))]
    assert imports == ["import torch", "import torch.nn.functional as F", "from torch import Tensor, nn"]
    assert {"class Packed(nn.Module):", "class SharedBasis(Compressed):"} <= {*lines}


def test_bad_input_is_one_line(tmp_path):
    def line(*args, **options) -> str:
        with pytest.raises(recombine.UsageError) as error:
            recombine.export(*args, **options)
        assert "\n" not in str(error.value)
        return str(error.value)

    model = made("tiny_vit")
    assert "no such format; did you mean hf? choose from hf, dense, lora" in line(model, tmp_path / "x", "hff")
    assert "is not recombined" in line(build("tiny_vit"), tmp_path / "x")
    assert "give a torch.nn.Module" in line(None, tmp_path / "x")
    assert "must be the path of a folder" in line(model, 3)
    assert "leave them out" in line(model, tmp_path / "x", rank=3)
    (tmp_path / "full").mkdir()
    save_file({"a": torch.zeros(1)}, tmp_path / "full/model.safetensors")
    assert "is there already; name a folder that is new or empty" in line(model, tmp_path / "full")
    assert load_file(tmp_path / "full/model.safetensors")["a"] == 0
    whole = build("tiny_vit")
    pruned = recombine.apply(whole, recombine.Isomorphic(), "retained_50", losses(whole))
    assert "Isomorphic made a VisionTransformer that its library does not build" in line(pruned, tmp_path / "x")
    dora = recombine.apply(made("tiny_llama"), recombine.Peft(options={"use_dora": True}))
    assert 'peft\'s lora around a compressed layer, which a folder of kind "hf" cannot hold' in line(
        dora, tmp_path / "x"
    )
    own = made("tiny_vit")
    own.__class__ = type("Own", (type(own),), {})
    vars(own).pop("recombine_source")
    assert "is neither timm's nor transformers' own" in line(own, tmp_path / "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]  # nothing is left behind


@pytest.mark.parametrize("name", ["GPT-2", "BLOOM", "Phi-3", "T5", "Llama, classes", "timm BEiT", "timm Swin v2"])
def test_other_forms_of_layers(name, tmp_path):
    """Transposed, interleaved, read instead of called, or an inner model that the configuration chooses."""
    tiny = MODELS[name]
    x = tiny.inputs()
    for method in (recombine.Peft(rank=2), recombine.Svd(ratio=0.5)):
        method.targets = tiny.targets or method.targets
        model = recombine.apply(tiny.fresh(), method).eval()
        torch.manual_seed(5)
        with torch.no_grad():
            for p in filter(lambda p: p.requires_grad, model.parameters()):
                p.add_(0.02 * torch.randn_like(p))
        folder = recombine.export(model, tmp_path / type(method).__name__)
        found = AutoModel.from_pretrained(folder, trust_remote_code=True)
        with torch.no_grad():
            assert torch.equal(output(found, x), output(model, x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_a_model_that_was_cast_after_it_was_built(dtype, tmp_path, caplog):
    model = made("tiny_llama").to(dtype)
    folder = recombine.export(model, tmp_path / "hf")
    assert "inv_freq as it was before the model was cast" in caplog.text
    again = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto").eval()
    wanted, found = (outputs(each, batch(model)) for each in (model, again))
    assert (found - wanted).norm() < 4 * torch.finfo(dtype).eps * wanted.norm()
    model.model.rotary_emb.inv_freq += 0.5
    with pytest.raises(recombine.UsageError, match="the values of model.rotary_emb.inv_freq are its own"):
        recombine.export(model, tmp_path / "other")
