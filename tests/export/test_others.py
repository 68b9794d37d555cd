"""Merged folders, LoRA adapters, the command, and runs that end with an export."""

import copy
import json
import shutil

import peft
import pytest
import timm
import torch
from safetensors.torch import save_file
from transformers import AutoModelForImageClassification

import recombine
from helpers import ROOT
from helpers import config as of_yaml
from helpers.command import execute, line
from recombine import models
from recombine.export import __main__ as command
from recombine.export.lora import to_lora
from scripts.tiny_models import MODELS
from zoo import batch, build, losses, outputs


@pytest.mark.parametrize("factor", ["plain", "pivot"])
@pytest.mark.parametrize("arch", ["tiny_vit", "tiny_swin", "tiny_deberta", "tiny_llama"])
def test_a_merged_folder_is_plain(arch, factor, tmp_path):
    model = recombine.apply(build(arch), recombine.Svd(factor=factor), "retained_50").eval()
    recombine.export(model, tmp_path / "dense", "dense")
    if "pretrained_cfg" in vars(model):
        found = timm.create_model(f"local-dir:{tmp_path / 'dense'}", pretrained=True).eval()
    else:
        found = type(model).from_pretrained(tmp_path / "dense")
    with torch.no_grad():
        assert torch.allclose(outputs(found, batch(model)), outputs(model, batch(model)), atol=1e-5)
    assert hasattr(model, "recombined") and type(found) is type(model)
    assert "trust_remote_code" not in (tmp_path / "dense/README.md").read_text()


def test_what_no_library_has_is_not_merged_into_a_folder(tmp_path):
    model = recombine.apply(models.build(**of_yaml("tiny_bert", num_classes=3)), recombine.Svd(), "retained_50")
    with pytest.raises(recombine.UsageError, match="no other library has a MeanPooled"):
        recombine.export(model, tmp_path / "dense", "dense")


MOVED = {
    "cersa": recombine.Cersa(),
    "crisp": recombine.Crisp(chunk=8),
    "svft": recombine.Svft(),
    "pivot": recombine.Svd(factor="pivot"),
    "rosa": recombine.Rosa(),
    "jactus": recombine.Jactus(),
    "lora": recombine.Peft(),
}


@pytest.mark.parametrize("method", MOVED.values(), ids=MOVED)
def test_the_difference_as_lora(method, tmp_path):
    """Exact where the rank suffices; with a small rank the error is the one that is said."""
    base = build("tiny_vit")
    model = copy.deepcopy(base)
    recombine.apply(model, copy.deepcopy(method), losses=losses(model))
    torch.manual_seed(4)
    with torch.no_grad():
        for p in filter(lambda p: p.requires_grad, model.parameters()):
            p.add_(0.03 * torch.randn_like(p))
    model.eval()
    recombine.export(model, tmp_path / "lora", "lora", base=base)
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lora").eval()
    x = batch(base)
    with torch.no_grad():
        assert torch.allclose(outputs(adapted, x), outputs(model, x), atol=1e-4)
        assert not torch.allclose(outputs(base, x), outputs(model, x), atol=1e-2)
    factors, errors = to_lora(model, base, rank=2)
    merged = recombine.merge(copy.deepcopy(model))
    for name, (b, a) in factors.items():
        delta = merged.get_submodule(name).weight - base.get_submodule(name).weight
        assert a.shape[0] <= 2 and torch.isclose(
            (delta - b @ a).norm() / delta.norm(), torch.tensor(errors[name]), atol=1e-4
        )
    kept = to_lora(model, base, energy=0.9)[1]
    assert all(error**2 <= 0.1 + 1e-6 for error in kept.values())


def test_a_lora_has_its_rank(tmp_path):
    """The rank of LoRA comes out again, not that of rounding; what is left out is said."""
    base = build("tiny_llama")
    model = recombine.apply(copy.deepcopy(base), recombine.Peft(rank=3, options={"init_lora_weights": False}))
    recombine.export(model, tmp_path / "lora", "lora", base=base)
    assert set(peft.LoraConfig.from_pretrained(tmp_path / "lora").rank_pattern.values()) == {3}
    assert max(json.loads((tmp_path / "lora/errors.json").read_text()).values()) < 1e-5


def test_a_lora_of_transposed_layers(tmp_path):
    """GPT-2 holds its weights as (in, out)."""
    base, ids = MODELS["GPT-2"].fresh(), MODELS["GPT-2"].inputs()
    model = recombine.apply(copy.deepcopy(base), recombine.Cersa(targets=("qkv", "o"))).eval()
    recombine.export(model, tmp_path / "lora", "lora", base=base)
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lora").eval()
    with torch.no_grad():
        y = model(**ids).logits
        assert torch.allclose(adapted(**ids).logits, y, atol=1e-4)
        assert not torch.allclose(base(**ids).logits, y, atol=1e-3)


def test_a_lora_that_nothing_would_call_is_refused(tmp_path):
    """BEiT reads the weight of its fused layer, past what peft puts around it."""
    base = MODELS["timm BEiT"].fresh()
    model = recombine.apply(copy.deepcopy(base), recombine.Cersa())
    with pytest.raises(recombine.UsageError, match="attn.qkv: Attention reads its weight instead of calling it"):
        recombine.export(model, tmp_path / "lora", "lora", base=base)
    with pytest.raises(recombine.UsageError, match="is not recombined"):
        to_lora(base, base)
    wrapped = torch.nn.DataParallel(recombine.apply(build("tiny_vit"), recombine.Cersa()))
    assert to_lora(wrapped, build("tiny_vit"))[0]


def test_a_lora_says_what_it_leaves_out(tmp_path, caplog):
    base = build("tiny_vit")
    model = recombine.apply(copy.deepcopy(base), recombine.Svd(), "retained_50")
    recombine.export(model, tmp_path / "lora", "lora", base=base, rank=1)
    assert "lora: not exact" in caplog.text
    for options, words in (
        ({"rank": 0}, "give a rank of 1 or more"),
        ({"rank": 2, "energy": 0.5}, "not both"),
        ({"energy": 2}, "must be a share"),
    ):
        with pytest.raises(recombine.UsageError, match=words):
            recombine.export(model, tmp_path / "x", "lora", base=base, **options)
    shifted = recombine.apply(copy.deepcopy(base), recombine.Ssf())
    with torch.no_grad():
        shifted.blocks[0].norm1.beta.add_(1)
    with pytest.raises(recombine.UsageError, match=r"blocks.0.norm1.bias differs from the base and is no weight"):
        recombine.export(shifted, tmp_path / "x", "lora", base=base)
    assert not (tmp_path / "x").exists()


def test_a_run_ends_with_its_folders_and_the_command_writes_them_too(tmp_path, capsys, monkeypatch):
    save_file(models.build(**of_yaml("tiny_vit")).state_dict(), tmp_path / "pretrained.safetensors")
    keys = ["method=svd", "budget=retained_50", "stage=compress", f"model.checkpoint={tmp_path}/pretrained.safetensors"]
    result = execute(tmp_path / "run", *keys, "export=[hf,dense,torch]")
    assert result["exports"] == {name: str(tmp_path / "run" / name) for name in ("hf", "dense", "torch")}
    shutil.rmtree(tmp_path / "run/dense")
    del result["exports"]["dense"]  # as a failed export leaves a run: it is made up
    (tmp_path / "run/result.json").write_text(json.dumps(result))
    result = execute(tmp_path / "run", *keys, "export=[hf,dense]")
    assert (tmp_path / "run/dense/config.json").is_file() and set(result["exports"]) == {"hf", "dense", "torch"}
    scoring = [*keys[-1:], "stage=evaluate", f"stage.checkpoint={result['checkpoint']}"]
    evaluated = execute(tmp_path / "scored", *scoring)
    assert evaluated["checkpoint"] == result["checkpoint"]
    assert command.main([str(tmp_path / "scored"), "--to", "torch", "--out", str(tmp_path / "of_scored")]) == 0
    evaluated = execute(tmp_path / "scored", *scoring, "export=torch")
    assert evaluated["exports"] == {"torch": str(tmp_path / "scored" / "torch")}
    evaluated["config"]["stage"]["bits"] = 8  # then the file does not hold what was scored
    (tmp_path / "scored/result.json").write_text(json.dumps(evaluated))
    assert command.main([str(tmp_path / "scored"), "--to", "hf"]) == 2
    assert "no file holds its model" in capsys.readouterr().err
    text = (tmp_path / "run/hf/README.md").read_text()
    assert result["command"] in text and f"| test | {result['metric']} |" in text and result["data"]["licence"] in text
    run, x = str(tmp_path / "run"), torch.randn(2, 3, 32, 32)
    assert command.main([run]) == 2 and "is there already" in capsys.readouterr().err
    assert command.main([run, "--out", str(tmp_path / "other")]) == 0
    model = recombine.load(result["checkpoint"]).eval()
    for folder in (tmp_path / "run/hf", tmp_path / "other"):
        found = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
        with torch.no_grad():
            assert torch.equal(found(x).logits, model(x))
        assert (folder / "README.md").read_text() == text
    program = torch.export.load(tmp_path / "run/torch/model.pt2").module()
    with torch.no_grad():
        assert torch.allclose(program(pixel_values=x), model(x), atol=1e-5)
    wrong = [([run, "--to", "onyx"], "no such format"), ([str(tmp_path / "no")], "no such file or folder")]
    wrong += [([str(tmp_path)], "holds no result.json"), ([f"{run}/result.json"], "truncated or corrupted")]
    for arguments, words in wrong:
        capsys.readouterr()
        assert command.main([*arguments, "--out", str(tmp_path / "new")] if "--to" not in arguments else arguments) == 2
        said = capsys.readouterr().err
        assert words in said and said.count("\n") == 1 and said.startswith("export: ")
    assert "export=onyx" in line(capsys, monkeypatch, tmp_path, "export=onyx")


def test_the_page_runs_as_it_stands(tmp_path, monkeypatch):
    """The Python of docs/export.md, but for the pretrained weights."""
    text = (ROOT / "docs" / "export.md").read_text().replace("pretrained=True", "img_size=32")
    first, load, adapters = (block.split("```")[0] for block in text.split("```python")[1:])
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    exec(first, scope)
    model = scope["model"].eval()
    exec(load, scope)
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(scope["model"](x).logits, model(x))  # one row: MKL rounds by where a weight begins
    pretrained = recombine.merge(copy.deepcopy(model))
    with torch.no_grad():
        pretrained.blocks[0].attn.qkv.weight.add_(torch.randn(576, 1) @ torch.randn(1, 192))
    scope |= {"model": model, "pretrained": pretrained}
    for number, line_ in enumerate(adapters.strip().splitlines()):
        exec(line_.replace("flowers_lora", f"lora{number}"), scope)
        assert peft.LoraConfig.from_pretrained(tmp_path / f"lora{number}").target_modules == {"blocks.0.attn.qkv"}
