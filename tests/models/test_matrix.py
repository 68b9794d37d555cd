"""Every model of scripts/tiny_models.py with five methods; what comes out is the table of docs/models.md."""

import pytest
import torch

import recombine
from scripts import model_matrix

PAGE = model_matrix.PAGE.read_text()
OWN = [  # built by hand there, or of a library that no file can name
    "timm Hiera", "timm MaxViT", "timm MobileViT", "timm MLP-Mixer", "timm ResMLP", "torchvision ViT, MLPs",
    "torchvision Swin, MLPs",
]  # fmt: skip
REFUSED = ["timm ConvNeXt", "torchvision ViT", "torchvision Swin", "Mixtral"]
HUB = {  # what configurations on hubs also say
    "BERT, classes": {"gradient_checkpointing": False, "id2label": {0: "not a cat", 1: "a cat, or two"}},
    "GPT-2": {"n_ctx": 64},
    "DistilBERT": {"tie_weights_": True},
}


@pytest.mark.parametrize("name", model_matrix.MODELS)
def test_a_model_does_what_the_table_says(name):
    """apply, train, save, load and merge in five methods, or a refusal in one line."""
    assert model_matrix.line(model_matrix.row(name)) in PAGE


def test_the_table_is_whole():
    rows = PAGE.split(model_matrix.BEGIN)[1].split(model_matrix.END)[0].strip().splitlines()[2:]
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == list(model_matrix.MODELS)
    passed = [row for row in rows if row.endswith("| yes |")]
    assert len(passed) >= 66 and len(rows) - len(passed) <= 4


@pytest.mark.parametrize("name", [name for name in model_matrix.MODELS if name not in REFUSED])
def test_a_file_holds_all_of_a_model(name, tmp_path):
    tiny = model_matrix.MODELS[name]
    model, method = tiny.fresh(), recombine.Svd()
    for key, value in HUB.get(name, {}).items():
        setattr(model.config, key, value)
    method.targets = tiny.targets or method.targets
    recombine.apply(model, method, "retained_50").eval()
    if name in OWN:
        with pytest.raises(recombine.UsageError, match="whole=False"):
            recombine.save(model, tmp_path / "m", whole=True)
        return
    alone = recombine.load(recombine.save(model, tmp_path / "m", whole=True)).eval()
    inputs = tiny.inputs()
    with torch.no_grad():
        assert torch.equal(model_matrix.output(alone, inputs), model_matrix.output(model, inputs))
