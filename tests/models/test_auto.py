"""Any model by its name: model=timm and model=hf, offline."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import recombine
from helpers import config, refusal
from helpers.command import config as whole_config
from recombine import models
from recombine.models import encoders, roles

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
TEXT = SIZES | {"vocab_size": 260, "max_position_embeddings": 66, "pad_token_id": 0}


def hf(**keys) -> dict:
    return config("hf") | keys


def timm(name: str, **keys) -> dict:
    return config("timm") | {"name": name, "pretrained": False} | keys


@pytest.fixture(scope="module")
def roberta(tmp_path_factory):
    """A folder that transformers saved: RoBERTa with a classifier of three, and its tokenizer."""
    folder = tmp_path_factory.mktemp("roberta")
    torch.manual_seed(0)
    made = transformers.RobertaConfig(**TEXT, num_labels=3)
    transformers.RobertaForSequenceClassification(made).save_pretrained(folder)
    encoders.byte_tokenizer(64).save_pretrained(folder)
    return folder


def test_timm_by_name():
    model = models.build(**timm("eva02_tiny_patch14_224", image_size=28, depth=2))
    assert roles.role_names(model)[:4] == ["qkv", "q", "k", "v"] and len(roles.blocks(model)) == 2
    assert model.recombine_source["arch"] == "eva02_tiny_patch14_224" and model.recombine_source["image_size"] == 28
    tagged = models.build(**timm("convnext_atto.d2_in1k"))  # it has no attn_drop_rate
    assert tagged.recombine_source["tag"] == "d2_in1k"
    again = models.build(**model.recombine_source)
    assert {n: p.shape for n, p in again.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    assert "model.name=eva02_base" in refusal(models.build, **timm("timm"))
    assert "did you mean" in refusal(models.build, **timm("eva2_base_patch14_224"))


def test_a_random_model_has_the_sizes_that_are_given():
    model = models.build(**hf(name="mine", pretrained=False, model_type="qwen3", task="lm", head_dim=8, **TEXT))
    assert type(model).__name__ == "Qwen3ForCausalLM" and model.training and len(roles.blocks(model)) == 2
    source = model.recombine_source
    assert models.objective(source) == "lm" and models.modality(source) == "text" and json.dumps(source)
    assert models.tokenizer(source)("ab")["input_ids"] == models.tokenizer({"name": "l", "library": "transformers",
        "arch": "llama", "id": None, "revision": None, "tag": None, "pretrained": False, "checkpoint": None,
    })("ab")["input_ids"]  # fmt: skip
    assert {n: p.shape for n, p in models.build(**source).named_parameters()} == {
        n: p.shape for n, p in model.named_parameters()
    }


def test_pictures():
    eyes = SIZES | {"patch_size": 8, "image_size": 16}
    model = models.build(**hf(name="mine", pretrained=False, model_type="vit", task="image", num_classes=3, **eyes))
    source = model.recombine_source
    assert models.modality(source) == "vision" and source["image_size"] == 16 and source["mean"] == [0.5] * 3
    models.reset_head(model, 7)
    assert roles.classes(model) == 7 and model(torch.zeros(2, 3, 16, 16)).logits.shape == (2, 7)


def test_a_folder_brings_weights_tokenizer_and_head(roberta, tmp_path):
    model = models.build(**hf(name=str(roberta), task="text", num_classes=3)).eval()
    assert models.has_own_head(model) and type(roles.head(model)).__name__ == "RobertaClassificationHead"
    plain = transformers.RobertaForSequenceClassification.from_pretrained(roberta).eval()
    tokens = models.tokenizer(model.recombine_source)("a cat", return_tensors="pt")
    assert torch.equal(model(**tokens).logits, plain(**tokens).logits)
    recombine.apply(model, recombine.Cersa(rank=4))
    again = recombine.load(recombine.save(model, tmp_path / "cersa.safetensors")).eval()  # builds it from its source
    assert torch.equal(again(**tokens).logits, model(**tokens).logits)
    recombine.merge(model)
    models.reset_head(model, 5)
    assert not models.has_own_head(model) and model(**tokens).logits.shape == (1, 5)
    other = models.build(**hf(name=str(roberta), task="text", num_classes=4))
    assert roles.classes(other) == 4 and not models.has_own_head(other)
    dropped = models.build(**hf(name=str(roberta), task="text", hidden_dropout_prob=0.3))
    assert dropped.config.hidden_dropout_prob == 0.3

    part = {
        key: tensor for key, tensor in load_file(roberta / "model.safetensors").items() if "layer.1.output" not in key
    }
    (tmp_path / "config.json").write_text((roberta / "config.json").read_text())
    save_file(part, tmp_path / "model.safetensors", {"format": "pt"})
    assert "lacks roberta.encoder.layer.1.output" in refusal(models.build, **hf(name=str(tmp_path), task="text"))


def test_what_cannot_be_is_one_line(roberta):
    assert "model.name=Qwen/Qwen3-0.6B" in refusal(models.build, **hf(task="lm"))
    assert "model.task=null" in refusal(models.build, **hf(name=str(roberta)))
    nothing = refusal(models.build, **hf(name="Qwen/Qwen3-0.6B", task="lm", pretrained=False))
    assert "give model.checkpoint=FOLDER" in nothing and "model.model_type" in nothing
    random = {"name": "mine", "pretrained": False, "task": "lm"}
    assert "no configuration" in refusal(models.build, **hf(**random, model_type="qwen33"))
    assert "no such key" in refusal(models.build, **hf(**random, model_type="qwen3", hiden_size=3))
    assert "for task lm" in refusal(models.build, **hf(**random, model_type="vit"))


@pytest.mark.parametrize("data, task", [("text", "lm"), ("glue", "text"), ("offline", "image")])
def test_the_data_say_what_the_model_is_for(data, task):
    from recombine import data as sets

    module = sets.build(**{k: v for k, v in whole_config(f"data={data}").data.items()})
    assert module.task_of_model == task
    assert models.for_task(hf(name="x"), task)["task"] == task
    assert models.for_task(hf(name="x", task="lm"), task)["task"] == "lm" and "task" not in models.for_task(
        config("tiny_vit"), task
    )
