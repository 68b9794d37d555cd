"""stage=adapt base=...: runs that adapt a compressed checkpoint."""

import json
import shutil
from importlib import import_module

import pytest
import torch

import recombine
from helpers import refusal
from helpers.command import CHUNK, config, execute, line
from recombine.runner import ranks
from recombine.runtime.digest import file_digest

HALF = ["method=crisp", CHUNK, "stage=compress", "budget=retained_50", "stage.distil.epochs=1", "trainer.epochs=1"]
OTHER = ["data.task=dsprites_ori", "trainer.epochs=1"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    return folder, execute(folder, *HALF)


@pytest.fixture(scope="module")
def adapted(base, tmp_path_factory):
    """The same base adapted by its own mixers and by LoRA, to another task."""
    folder = tmp_path_factory.mktemp("adapted")
    return folder, {m: execute(folder / m, f"base={base[0]}", f"method={m}", *OTHER) for m in ("crisp", "lora")}


def test_the_result_tells_its_base_and_counts_from_it(base, adapted):
    folder, compressed = base
    file = folder / "best.safetensors"
    for name, result in adapted[1].items():
        assert result["base"] == {"path": str(file), "sha256": file_digest(file)} and result["budget"] == "none"
        assert result["method"]["label"] == name and {"best.safetensors", "adapter.safetensors"} == {*result["sha256"]}
    crisp, lora = adapted[1]["crisp"], adapted[1]["lora"]
    assert crisp["compressor"] is None and lora["compressor"]["label"] == "crisp"
    before = compressed["account"]
    assert crisp["account"]["retained"] == before["retained"] < lora["account"]["retained"] < before["retained"] + 0.1
    assert crisp["account"]["trained_without_head"] == 4 * 4 * 7 * 16  # blocks, roles, rank and chunk of the mixers
    assert crisp["method"]["basis_rank"] == 7 and crisp["method"]["lr"] == config("method=crisp").method.lr
    size, added = ((adapted[0] / "crisp" / name).stat().st_size for name in ("best.safetensors", "adapter.safetensors"))
    assert added < 0.5 * size


@pytest.mark.parametrize("name", ["crisp", "lora"])
def test_it_is_scored_again_and_its_adapter_put_on_the_base(name, base, adapted, tmp_path):
    folder, result = adapted[0] / name, adapted[1][name]
    best = f"stage.checkpoint={folder}/best.safetensors"
    assert execute(tmp_path, "stage=evaluate", best, *OTHER[:1])["test"] == result["test"]
    torch.manual_seed(0)  # the random backbone of the run
    whole = recombine.load(folder / "best.safetensors").eval()
    torch.manual_seed(0)
    model = recombine.load(base[0] / "best.safetensors").eval()
    recombine.load_adapter(model, folder / "adapter.safetensors", "ori")
    x = torch.randn(4, 3, 32, 32)
    assert torch.equal(recombine.set_adapter(model, "ori")(x), whole(x))
    assert len(recombine.adapters(model)["ori"].labels) == 16


@pytest.mark.parametrize("name", ["crisp", "lora"])
def test_it_goes_on_where_it_was_cut_off(name, base, adapted, tmp_path, monkeypatch):
    words = [f"base={base[0]}/best.safetensors", f"method={name}", *OTHER]

    def stop(run):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(import_module("recombine.stages.adapt"), "train_and_test", stop)  # the module
        with pytest.raises(KeyboardInterrupt):
            ranks.main(config(*words), tmp_path)
    (state,) = tmp_path.glob(".state/*/rewritten.safetensors")
    assert state.stat().st_size < 0.5 * (adapted[0] / name / "best.safetensors").stat().st_size
    ranks.main(config(*words), tmp_path)
    again = json.loads((tmp_path / "result.json").read_text())
    assert again["test"] == adapted[1][name]["test"] and again["account"] == adapted[1][name]["account"]


def test_a_file_that_holds_all_of_the_model_is_a_base_too(base, adapted, tmp_path):
    torch.manual_seed(0)
    whole = recombine.save(recombine.load(base[0] / "best.safetensors"), tmp_path / "whole", whole=True)
    result = execute(tmp_path / "run", f"base={whole}", "method=crisp", "seed=1", "optim.head=probe", *OTHER)
    assert result["linear_probe"] and result["account"] == adapted[1]["crisp"]["account"]


def test_refusals(base, adapted, tmp_path, capsys, monkeypatch):
    here = f"base={base[0]}"
    lines = {
        "base=/nowhere: there is no file /nowhere": ["base=/nowhere"],
        "holds an adapter; load its base": [f"base={adapted[0]}/crisp/adapter.safetensors"],
        "is adapted by lora already": [f"base={adapted[0]}/lora"],
        "is compressed already; drop one": [here, "method@compressor=svd", "method=lora"],
        "stage=joint starts from the pretrained model": [here, "stage=joint"],
        "has left none in base=": [here, "method=cersa"],
        "method.basis_rank=3: base=": [here, "method.basis_rank=3"],
        "budget=retained_50: method=crisp trains what base=": [here, "budget=retained_50"],
        "was made from model=tiny_vit": [here, "model=tiny_swin"],
        "say model.image_size=32": [here, "model.image_size=64"],
    }
    half = tmp_path / "half"
    shutil.copytree(base[0], half)
    (half / "result.json").unlink()
    lines["that run has not finished, so its best.safetensors may still change"] = [f"base={half}"]
    for part, words in lines.items():
        assert part in (said := refusal(execute, tmp_path, *words)), said
    assert "base=7: there is no file 7" in line(capsys, monkeypatch, tmp_path, "base=7")
