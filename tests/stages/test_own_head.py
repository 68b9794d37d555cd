"""A backbone that is scored with its own head."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from safetensors.torch import save_file

from helpers import CONF, refusal
from helpers.hub_pictures import encoded, make, store
from recombine import models
from recombine.data.vision.suites import Imagenet
from recombine.runner import ranks

pytestmark = pytest.mark.usefixtures("empty_caches")


def imagenet(tmp_path: Path, classes: int = 1000) -> tuple[Path, Path]:
    """ImageNet's parquet files, one picture a class and split, and the weights of a tiny ViT with a head of its own."""
    if not (tmp_path / "imagenet").is_dir():
        store(tmp_path / "imagenet", Imagenet.rows["imagenet"])
    torch.manual_seed(0)
    chosen = yaml.safe_load((CONF / "model" / "tiny_vit.yaml").read_text())
    save_file(
        models.build(**chosen | {"num_classes": classes}).state_dict(), file := tmp_path / f"{classes}.safetensors"
    )
    return tmp_path, file


def execute(folder: Path, root: Path, *overrides: str) -> dict:
    said = ["model=tiny_vit", "data=imagenet", f"data.root={root}", "data.batch_size=100", "trainer=cpu", "probe=false"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        ranks.main(compose("config", [*said, "trainer.progress=false", "trainer.epochs=1", *overrides]), folder)
    return json.loads((folder / "result.json").read_text())


def test_the_original_model_is_scored_with_its_own_head(tmp_path):
    """CRISP Fig. 4: ImageNet's validation set, before and after an exact rewrite."""
    root, file = imagenet(tmp_path)
    weights = f"model.checkpoint={file}"
    first = execute(tmp_path / "a", root, "stage=evaluate", weights)
    assert first["method"] is None and first["checkpoint"] is None and first["account"]["trained"] == 0
    assert first["linear_probe"] is None and first["account"]["retained"] == 1 and first["layers"] == []

    model = models.build(**first["model"]).eval()
    module = make(Imagenet, "imagenet", root=root, image_size=32)
    module.attach_model(**models.for_data(model.recombine_source))
    with torch.no_grad():
        logits = model(module.normalise(torch.from_numpy(np.array(module.test.images)))).double()
    labels = torch.from_numpy(module.test.labels)
    assert models.has_own_head(model) and len(labels) == 1000
    assert first["test"]["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert first["test"]["acc"] == pytest.approx((logits.argmax(1) == labels).double().mean().item())

    exact = ["method=crisp", "method.chunk=16"]
    after = execute(tmp_path / "b", root, "stage=retrofit", "stage.test=true", weights, *exact)
    assert after["test"] == pytest.approx(first["test"], rel=1e-4) and after["logit_error"] < 1e-3
    for folder, before, *stage in (("e", first, "stage=evaluate"), ("f", after, "stage=retrofit", "stage.test=true")):
        rounded = execute(tmp_path / folder, root, *stage, "stage.bits=8", weights, *exact)
        bytes_ = [found["account"]["bytes_weights"] for found in (rounded, before)]
        assert 0.25 < bytes_[0] / bytes_[1] < 0.7 and rounded["test"]["loss"] != before["test"]["loss"]
        assert rounded["test"]["loss"] == pytest.approx(before["test"]["loss"], rel=1e-2)
    still = ["optim.lr=0", "optim.lr_head=0", "stage.distil.epochs=0"]  # nothing moves: the head is still the own one
    kept = execute(tmp_path / "c", root, "stage=joint", weights, *exact, *still)
    assert kept["test"] == pytest.approx(first["test"], rel=1e-4)
    again = execute(tmp_path / "d", root, "stage=evaluate", weights, f"stage.checkpoint={kept['checkpoint']}")
    assert again["test"] == pytest.approx(kept["test"], rel=1e-5) and again["method"]["name"] == "Crisp"


def test_a_linear_probe_of_the_original_may_be_the_head(tmp_path):
    """The accuracy before any training, of the model as it was and of one that lost most of its weights."""
    common = ["model=tiny_vit", "data=offline", "data.task=dsprites_loc", "data.limit=64", "trainer.progress=false"]
    common += ["trainer=cpu", "stage=retrofit", "stage.test=true", "optim.head=probe"]
    found = []
    for name, method in (("a", ["method=full"]), ("b", ["method=svd", "method.rank=1"])):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            ranks.main(compose("config", [*common, *method]), tmp_path / name)
        found.append(json.loads((tmp_path / name / "result.json").read_text()))
    assert found[0]["test"]["acc"] == pytest.approx(found[0]["linear_probe"]["test"])
    assert found[1]["linear_probe"] == found[0]["linear_probe"] and found[1]["test"]["loss"] != found[0]["test"]["loss"]


def test_no_head_for_the_data_is_one_line(tmp_path):
    root, file = imagenet(tmp_path, 7)
    look = "stage=evaluate"
    assert "has no head of its own for data=imagenet (its weights have none)" in refusal(
        execute, tmp_path / "a", root, look
    )
    seven = refusal(execute, tmp_path / "b", root, look, f"model.checkpoint={file}")
    assert "its weights tell 7 classes apart, not 1000" in seven and "take model.tag=augreg_in21k_ft_in1k" in seven
    folder = tmp_path / "photos"
    for i in range(7 * 20):
        path = folder / f"class {i % 7}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(i, "PNG"))
    mine = ["data=folder", f"data.root={folder}", "data.batch_size=32", f"model.checkpoint={file}"]
    where = tmp_path / "c"
    told = refusal(execute, where, folder, look, *mine)
    assert "the one in its weights is of 7 classes too" in told and "+model.num_classes=7 takes it" in told
    assert not (where / "result.json").exists() and "of 7 classes too" in refusal(
        execute, where, folder, "stage=retrofit", "stage.test=true", "method=svd", *mine
    )
    taken = execute(where, folder, look, *mine, "+model.num_classes=7")
    assert taken["data"]["sizes"]["test"] == 28 and 0 <= taken["test"]["acc"] <= 1
    fresh = execute(tmp_path / "d", folder, "method=linear_probe", "probe=true", *mine)
    assert fresh["model"]["num_classes"] == 0 and fresh["linear_probe"]  # another head than the weights', as always


def test_tags_with_imagenets_head():
    assert models.tags("vit_base_patch16_224", 1000)[:2] == ["augreg2_in21k_ft_in1k", "augreg_in1k"]
    assert "augreg_in21k" not in models.tags("vit_small_patch16_224", 1000)
    assert "augreg_in21k" in models.tags("vit_small_patch16_224", 21843)
