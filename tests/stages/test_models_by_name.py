"""model=timm and model=hf on the command line, in this process: from a name to result.json, and back from the file."""

import json

import pytest

import recombine
from helpers.command import config, execute
from recombine.runner import ranks

SIZES = ["hidden_size=16", "num_hidden_layers=2", "num_attention_heads=2", "intermediate_size=32"]
RANDOM = ["model=hf", "model.name=mine", "model.pretrained=false", *(f"+model.{size}" for size in SIZES)]


@pytest.mark.parametrize(
    "said, roles",
    [
        (["model=timm", "model.name=beit_base_patch16_224", "model.pretrained=false", "model.image_size=32",
          "+model.depth=1", "+model.embed_dim=48", "+model.num_heads=3"], "qkv o up down"),
        ([*RANDOM, "model.model_type=vit", "model.image_size=32", "+model.patch_size=16"], "q k v o up down"),
    ],
    ids=["timm", "hf"],
)  # fmt: skip
def test_pictures(tmp_path, said, roles):
    method = ["method=crisp", "method.chunk=16", "budget=retained_50", "stage=joint", "stage.distil.epochs=1"]
    result = execute(tmp_path, *said, *method)
    assert sorted({row["role"] for row in result["layers"]}) == sorted(roles.split())
    assert result["account"]["retained"] <= 0.5 and result["test"]["acc"] >= 0
    assert result["model"]["name"] in ("mine", "beit_base_patch16_224") and result["model"]["image_size"] == 32


def test_words(cache, byte_tokenizer, tmp_path, capsys):
    said = [*RANDOM, "model.model_type=phi3", "+model.vocab_size=300", "+model.num_key_value_heads=1", "data=text"]
    ranks.main(config(*said, "data.max_length=32", "data.limit=8", "method=lora", "method.rank=2"), tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    assert [row["role"] for row in result["layers"]] == ["q", "k", "v"] * 2
    assert result["data"]["objective"] == "lm" and result["model"]["task"] == "lm"
    assert "lora on mine" in capsys.readouterr().out


def test_a_refusal_is_one_line(tmp_path):
    with pytest.raises(recombine.UsageError, match="model.name=eva02_base_patch14_224") as error:
        execute(tmp_path, "model=timm")
    assert "\n" not in str(error.value)
