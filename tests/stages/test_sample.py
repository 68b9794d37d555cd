"""Runs that draw: DreamBooth's training by three methods, stage=sample, and Stable Diffusion's layout from a hub."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")  # an extra

from PIL import Image  # noqa: E402

import recombine  # noqa: E402
from helpers import drawing, hub_content  # noqa: E402
from helpers.command import execute, line  # noqa: E402
from helpers.hub_client import hub  # noqa: E402, F401
from recombine.errors import UsageError  # noqa: E402
from recombine.models import packaged  # noqa: E402
from recombine.models.diffusion_parts import Prompts  # noqa: E402

DRAW = ["sample.seeds=[0,1]", "sample.steps=2"]


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    weights = packaged.dinov2_s14_weights()
    folder = tmp_path_factory.mktemp("cache")
    (folder / "weights").mkdir()
    (folder / "weights" / weights.name).symlink_to(weights)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECOMBINE_CACHE", str(folder))
        yield folder


@pytest.fixture
def tiny(tmp_path):
    return [*drawing.COMMAND, "data=dreambooth", f"data.root={drawing.subject(tmp_path)}", *drawing.SHORT]


@pytest.mark.parametrize("method", ["full", "lora", "cersa"])
def test_a_subject_is_learnt_and_drawn(method, tiny, tmp_path, own_cache):
    result = execute(tmp_path / "run", *tiny, f"method={method}", *DRAW)
    assert result["data"]["protocol"].startswith("5 pictures of 'a photo of sks cat', 3 of 'a photo of cat'")
    assert result["metric"] == "loss" and result["test"]["loss"] > 0 and result["account"]["trained"] > 0
    for name in ("dino", "dino_prior", "dino_leak", "diversity"):
        assert -1 <= result["test"][name] <= 2
    assert list(result["pictures"]) == ["a photo of sks cat", "a photo of cat"]
    for files in result["pictures"].values():
        assert [Image.open(tmp_path / "run" / file).size for file in files] == [(16, 16)] * 2
    sheet = Image.open(tmp_path / "run" / "pictures" / "sheet.png")
    assert sheet.size == (2 + 18 * 5, 2 + 18 * 3)  # the subject's five, then two prompts
    assert len(list((own_cache / "prior").iterdir())) == 1  # drawn once, whatever the method

    again = execute(tmp_path / "again", *tiny, "stage=sample", f"stage.checkpoint={result['checkpoint']}", *DRAW)
    assert {key: again["test"][key] for key in again["test"]} == pytest.approx(
        {key: result["test"][key] for key in again["test"]}, abs=1e-4
    )
    assert "loss" not in again["test"] and again["method"]["label"] == method
    for file in again["pictures"]["a photo of sks cat"]:
        one, two = (np.asarray(Image.open(tmp_path / run / file), np.int64) for run in ("run", "again"))
        assert abs(one - two).max() <= 1
    if method == "full":
        keys = ["stage=sample", f"stage.checkpoint={result['checkpoint']}", "quantize.bits=4", *DRAW]
        packed = execute(tmp_path / "packed", *tiny, *keys)
        assert packed["quantized"]["bits"] == 4
        assert packed["account"]["bytes_weights"] < 0.8 * again["account"]["bytes_weights"]


def test_a_compressor_sees_denoising_losses(tiny, tmp_path):
    result = execute(
        tmp_path / "run",
        *tiny,
        "method=svd_llm",
        "budget=retained_75",
        "stage=compress",
        "stage.distil.epochs=1",
        *DRAW,
    )
    assert 0.6 < result["account"]["retained"] <= 0.75 and result["test"]["dino"] is not None
    assert all(0 <= error < 1 for error in result["weight_error"].values())


def test_customconcept_and_a_folder_for_diffusers(tmp_path):
    """A subject of its release from end to end, shown to W&B, and the merged UNet read again by diffusers."""
    from diffusers import UNet2DConditionModel

    drawing.subject(tmp_path)
    (tmp_path / "dataset.json").write_text(json.dumps([{"instance_data_dir": "./x/cat", "class_prompt": "kitten"}]))
    data = ["data=customconcept", f"data.root={tmp_path}", "data.task=cat", *drawing.SHORT]
    keys = [*drawing.COMMAND, *data, "method=cersa", "logger=wandb", "export=[dense]", *DRAW]
    result = execute(tmp_path / "run", *keys)
    assert list(result["pictures"]) == ["a photo of sks kitten", "a photo of kitten"]
    assert list((tmp_path / "run").glob("wandb/offline-run-*/files/media/images/pictures_*.png"))
    folder = tmp_path / "run/dense"
    assert {path.name for path in folder.iterdir()} == {"unet", "scheduler", "README.md"}
    assert UNet2DConditionModel.from_pretrained(folder / "unet").config.sample_size == 8
    assert 'UNet2DConditionModel.from_pretrained("this/folder", subfolder="unet")' in (folder / "README.md").read_text()
    model = recombine.apply(drawing.build(seed=0), recombine.Cersa(alpha=0.5, targets=("q", "o", "down")))
    theirs = UNet2DConditionModel.from_pretrained(recombine.export(model, tmp_path / "own", "dense") / "unet").eval()
    model, x, states = model.eval(), torch.randn(2, 12, 8, 8), torch.randn(2, 5, 16)
    with torch.no_grad():
        ours, found = (unet(x, 3, encoder_hidden_states=states).sample for unet in (model.unet, theirs))
    assert torch.allclose(ours, found, atol=1e-5)


def test_prompts_of_the_users_own(tiny, tmp_path):
    asked = "sample.prompts=['a {token} {noun} on the moon','a photo of cat','rain']"
    result = execute(tmp_path / "run", *tiny, "stage=sample", asked, *DRAW, "sample.scheduler=dpm", "sample.guidance=1")
    assert list(result["pictures"]) == ["a sks cat on the moon", "a photo of cat", "rain"]
    assert result["method"] is None and result["checkpoint"] is None


def test_an_interrupted_training_goes_on_to_the_same_weights(tiny, tmp_path, monkeypatch):
    from recombine.training.lit import LitRecombine

    quiet = [*tiny, "method=lora", "trainer.epochs=2", "sample.seeds=[]"]
    whole = execute(tmp_path / "whole", *quiet)
    step = LitRecombine.training_step

    def stop(self, batch, index):
        if self.current_epoch == 1:
            raise KeyboardInterrupt
        return step(self, batch, index)

    with monkeypatch.context() as patch:
        patch.setattr(LitRecombine, "training_step", stop)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            execute(tmp_path / "part", *quiet)
    resumed = execute(tmp_path / "part", *quiet)
    assert resumed["test"]["loss"] == whole["test"]["loss"]
    assert resumed["curves"]["train/loss"] == whole["curves"]["train/loss"]


def test_stable_diffusions_repository_from_end_to_end(hub, tmp_path):  # noqa: F811
    """Tiny random weights in the layout of the hub's repository: fetched, one step through the autoencoder, drawn."""
    commit = hub_content.add_stable_diffusion(hub)
    sizes = ["model.sample_size=8", "model.cross_attention_dim=16", "model.attention_head_dim=[1,2]"]
    keys = ["model=sd21_base", *sizes, "data=dreambooth", f"data.root={drawing.subject(tmp_path)}", *drawing.SHORT]
    result = execute(tmp_path / "run", *keys, "method=cersa", *DRAW)
    assert result["model"]["image_size"] == 16 and result["test"]["loss"] > 0
    assert result["weights"]["commit"] == commit and result["weights"]["hub"] == result["model"]["id"]
    assert list(result["weights"]["sha256"]) == [
        "text_encoder/model.safetensors", "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ]  # fmt: skip
    assert all(Image.open(tmp_path / "run" / f).size == (16, 16) for f in result["pictures"]["a photo of sks cat"])
    fetched = {p.name for p in Path(hub_folder(result)).rglob("*") if p.is_file()}
    assert "model_index.json" in fetched and not {"v2-1_512-ema-pruned.ckpt"} & fetched
    assert not [name for name in fetched if "fp16" in name or "non_ema" in name or name.endswith(".bin")]
    folder = next(Path(hub_folder(result)).iterdir())
    assert Prompts(folder, "folder")(["a"])["input_ids"][0, 3:].unique().tolist() == [0]  # SD 2 pads with "!"
    layers = [drawing.LINEAR, r"text_encoder\..*self_attn\.\w+_proj"]  # of CERSA A.1
    both = ["model.train_text=true", f"method.targets={layers}".replace("\\\\", "\\")]
    text = execute(tmp_path / "text", *keys, *both, "method=cersa", "sample.seeds=[]")
    assert {layer["name"].split(".")[0] for layer in text["layers"]} == {"unet", "text_encoder"}
    whole = ["method@compressor=svd_llm", "method=lora", "stage=joint", "stage.order=adapt_first", "budget=retained_75"]
    with pytest.raises(UsageError, match="parts that lie in its folder; leave it out"):
        execute(tmp_path / "order", *keys, *whole)
    small = execute(tmp_path / "small", *keys, "method=svd", "budget=retained_50", "stage=retrofit", "sample.seeds=[]")
    assert small["account"]["retained"] <= 0.5
    hub.stop()
    again = execute(tmp_path / "again", *keys, "stage=sample", f"stage.checkpoint={result['checkpoint']}", *DRAW)
    assert again["test"]["dino"] == pytest.approx(result["test"]["dino"], abs=1e-4)


def hub_folder(result) -> str:
    from huggingface_hub import constants

    return str(Path(constants.HF_HUB_CACHE) / f"models--{result['model']['id'].replace('/', '--')}" / "snapshots")


@pytest.mark.parametrize("change, words", [
    ("data.prompt='a photo of {noun}'", "data.prompt=a photo of {noun}: the subject's word 'sks' is not in it"),
    ("sample.prompts=['a photo of a cat']", "the subject's word 'sks' is in none of them"),
    ("data.class_prompt='a {thing}'", "data.class_prompt=a {thing}: only {token} and {noun}"),
    ("data.image_size=24", "data.image_size=24: the model draws 16 x 16 pixels"),
    ("model.image_size=18", "image_size=18 is no multiple of 4"),
    ("data.root=/nowhere", "data.root=/nowhere: there is no such folder"),
    ("export=[hf]", "export to hf: a model that draws is written as dense"),
    ("sample.clip=/nowhere", "sample.clip=/nowhere: there is no such folder"),
    ("sample.scheduler=plms", "sample.scheduler=plms: must be one of ddim, dpm, euler"),
])  # fmt: skip
def test_bad_input_is_one_line(change, words, tiny, capsys, monkeypatch, tmp_path):
    assert words in line(capsys, monkeypatch, tmp_path, *tiny, change)


@pytest.mark.parametrize("count, words", [(0, "holds no pictures"), (1, "holds one picture")])
def test_too_few_pictures_are_one_line(count, words, capsys, monkeypatch, tmp_path):
    root = drawing.subject(tmp_path, count)
    said = line(capsys, monkeypatch, tmp_path, *drawing.COMMAND, "data=dreambooth", f"data.root={root}")
    assert words in said


def test_stage_sample_needs_a_model_that_draws(capsys, monkeypatch, tmp_path):
    assert "take data=dreambooth" in line(capsys, monkeypatch, tmp_path, "stage=sample")


def test_the_result_names_every_key(tiny, tmp_path):
    from recombine import results

    execute(tmp_path / "run", *tiny, "stage=sample", *DRAW)
    assert results.read(tmp_path / "run" / "result.json")["data"]["name"] == "dreambooth"
    assert json.loads((tmp_path / "run" / "result.json").read_text())["stage"] == "sample"
