"""Text models out of folders, packages and a hub."""

import recombine  # isort: skip  (its guard comes before transformers)

import hashlib
import json

import numpy as np
import pytest
import sentencepiece
import torch
import transformers
from safetensors.torch import load_file, save_file

from helpers import config, hub_content, refusal
from helpers.texts import DEBERTA
from recombine import data, models
from recombine.core.rewrite import find_sites
from recombine.data.text import glue
from recombine.models import packaged, roles, weights
from recombine.models.hf_folder import model_files


def test_minilm_is_the_packaged_sentence_encoder(packages):
    packages("minilm")
    model = models.build(**config("minilm", num_classes=2)).eval()
    folder = packaged.minilm_folder()
    state, filled = load_file(folder / "model.safetensors"), model.bert.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in filled.items())
    plain, tokens = transformers.BertModel.from_pretrained(folder), models.tokenizer(model.recombine_source)
    batch = tokens(["A film to remember.", "Dull"], padding=True, return_tensors="pt")
    caught = []
    model.classifier.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    with torch.no_grad():
        model(**batch)
        hidden = plain.eval()(**batch).last_hidden_state.numpy()
    lengths = batch["attention_mask"].sum(1).tolist()
    mean = np.stack([row[:n].mean(0) for row, n in zip(hidden, lengths, strict=True)])
    assert np.abs(caught[0].numpy() - mean).max() < 1e-6
    assert len(roles.find(model, ("q", "k", "v", "o", "up", "down"))) == 36 and roles.head(model) is model.classifier


def test_head_can_be_taken_off_and_put_on(bert):
    model = models.build(**config("tiny_bert"))
    assert model.training and roles.head(model) is None
    ids = torch.randint(4, 260, (2, 5))
    assert model(input_ids=ids).logits.shape == (2, 48)
    models.reset_head(model, 4)
    assert roles.head(model).out_features == 4 and model(input_ids=ids).logits.shape == (2, 4)
    again = models.build(**bert.recombine_source)
    assert again.state_dict().keys() == bert.state_dict().keys()


def test_bytes_spell_every_text(tokenizer):
    said = "naïve ﬁlm\t😀 [SEP]"
    assert tokenizer.decode(tokenizer(said)["input_ids"], skip_special_tokens=True) == said.replace("[SEP]", "")
    pair = tokenizer("ab", "c")
    assert pair["token_type_ids"] == [0, 0, 0, 0, 1, 1] and len(tokenizer) == 260


def test_deberta_in_the_hubs_format(deberta):
    source = config("deberta_v3_base", **DEBERTA, checkpoint=str(deberta), num_classes=3, cls_dropout=0.15)
    torch.manual_seed(2)
    model = models.build(**source)
    state = torch.load(deberta / "pytorch_model.bin")
    filled = model.deberta.state_dict()
    assert all(torch.equal(filled[name], state[f"deberta.{name}"].float()) for name in filled)
    assert model.dropout.p == 0.15 and model.config.hidden_dropout_prob == 0.1
    torch.manual_seed(3)
    other = models.build(**model.recombine_source)
    assert torch.equal(model.pooler.dense.weight, other.pooler.dense.weight)  # the backbone's: no seed moves it
    assert not torch.equal(model.classifier.weight, other.classifier.weight)

    tokens = models.tokenizer(model.recombine_source)
    ids = tokens("the cat sat", "a dog")["input_ids"]
    plain = sentencepiece.SentencePieceProcessor(model_file=str(deberta / "spm.model"))
    assert ids == [1, *plain.encode("the cat sat"), 2, *plain.encode("a dog"), 2]
    assert tokens.pad_token_id == 0 and model.eval()(input_ids=torch.tensor([ids])).logits.shape == (1, 3)

    recombine.apply(model, recombine.Cersa(targets=("q", "k", "v"), alpha=0.9))
    recombine.save(model, deberta.parent / "cersa.safetensors")
    loaded = recombine.load(deberta.parent / "cersa.safetensors", other).eval()
    x = torch.tensor([ids])
    assert torch.equal(loaded(input_ids=x).logits, model(input_ids=x).logits)
    alone = recombine.load(deberta.parent / "cersa.safetensors").eval()  # from what the checkpoint says of its model
    assert torch.equal(alone(input_ids=x).logits, model(input_ids=x).logits)
    featureless = models.build(**source | {"num_classes": 0})
    loaded = recombine.load(deberta.parent / "cersa.safetensors", featureless).eval()
    assert torch.equal(loaded(input_ids=x).logits, model(input_ids=x).logits)


def test_folders_that_do_not_fit_are_refused(deberta, tmp_path):
    def folder(name: str, change=None, **keys) -> dict:
        here = tmp_path / name
        here.mkdir()
        for file in ("spm.model", "tokenizer_config.json"):
            (here / file).write_bytes((deberta / file).read_bytes())
        said = json.loads((deberta / "config.json").read_text()) | keys
        (here / "config.json").write_text(json.dumps(said))
        state = {k: v.clone() for k, v in torch.load(deberta / "pytorch_model.bin").items()}
        if change:
            change(state)
        save_file(state, here / "model.safetensors")
        return config("deberta_v3_base", **DEBERTA, checkpoint=here)

    assert "no config.json" in refusal(models.build, **config("deberta_v3_base", checkpoint=tmp_path))
    key = "deberta.encoder.layer.1.output.dense.weight"
    assert f"lacks {key}" in refusal(models.build, **folder("lack", lambda s: s.pop(key)))
    assert key in refusal(models.build, **folder("shape", lambda s: s.update({key: torch.zeros(3, 3)})))
    more = "deberta.encoder.layer.2.output.dense.weight"
    assert f"too much: {more}" in refusal(models.build, **folder("more", lambda s: s.update({more: s[key].clone()})))
    assert "not finite" in refusal(models.build, **folder("nan", lambda s: s[key].fill_(float("nan"))))
    assert "a bert, not a deberta-v2" in refusal(models.build, **folder("bert", model_type="bert"))
    sizes = refusal(models.build, **folder("sizes") | {"hidden_size": 768, "position_buckets": 256})
    assert "model.hidden_size=32 model.position_buckets=8" in sizes
    cut = folder("cut")
    path = cut["checkpoint"] / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert str(cut["checkpoint"]) in refusal(models.build, **cut)
    whole = folder("tokens")
    (whole["checkpoint"] / "spm.model").write_bytes(b"no model")
    assert "no tokenizer" in refusal(models.tokenizer, models.build(**whole).recombine_source)
    assert "no such key" in refusal(models.build, **folder("key"), hiden_size=3)
    many = refusal(models.build, **config("tiny_bert", hidden_size="many"))
    assert "model.hidden_size=many: must be a whole number" in many
    assert "multiple of the number of attention heads" in refusal(models.build, **config("tiny_bert", hidden_size=50))
    assert "pooling=max" in refusal(models.build, **config("tiny_bert", pooling="max"))
    assert "no package holds" in refusal(models.build, **config("deberta_v3_base", tag="packaged"))
    assert "sees pictures" in refusal(models.tokenizer, {"name": "tiny_vit", "arch": "vit"})


def test_deberta_has_the_papers_size():
    """CERSA Tab. 8: 2814.0 MiB for full fine-tuning, 730.5 for LoRA of rank 32 on q, k, v: the pooler stays frozen."""
    with torch.device("meta"):
        model = models.build(**config("deberta_v3_base", pretrained=False, num_classes=2))
        weights = sum(p.numel() for p in model.parameters())
        assert 16 * weights / 2**20 == pytest.approx(2814.0, abs=0.1)
        lora = sum(
            32 * sum(site.module.weight.shape)
            for site in find_sites(model, recombine.Peft(targets=("q", "k", "v"), rank=32))
        )
        head = sum(p.numel() for p in roles.head(model).parameters())
        assert (4 * weights + 16 * lora + 12 * head) / 2**20 == pytest.approx(730.5, abs=0.05)


def test_weights_are_taken_in_one_form():
    rest = ["config.json", "spm.model", "tokenizer_config.json"]
    assert model_files([*rest, "pytorch_model.bin", "tf_model.h5"]) == ["pytorch_model.bin", *rest]
    safe = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert model_files([*rest, *safe, "pytorch_model.bin", "original/params.json"]) == [*safe, *rest]
    assert model_files(rest) == [] == model_files(["model.safetensors"])


def test_a_hub_that_answers_and_one_that_does_not(hub, tmp_path, monkeypatch):
    """Download, cache, and nobody there: the tokenizer comes from the same files, and the data."""
    monkeypatch.setenv("RECOMBINE_CACHE", str(tmp_path / "cache"))
    hub_content.add_deberta(hub)
    hub_content.add_glue(hub, "mrpc", "rte")
    source = config("deberta_v3_base", **DEBERTA)
    for _ in range(2):  # the second time out of the cache
        model = models.build(**source)
        module = data.build("glue", task="mrpc", select="test")
        module.attach_model(**models.for_data(model.recombine_source))
        module.prepare_data()
        module.setup()
        hub.stop()
    assert f"nyu-mll/glue@{glue.REVISION[:8]}" in module.info["note"] and module.info["commit"] == glue.REVISION
    assert (len(module.train), len(module.test)) == (60, 20)
    told = weights.origin(model.recombine_weights)
    assert (told["hub"], told["commit"]) == (source["id"], source["revision"])
    (file,) = told["sha256"]
    content = (model.recombine_weights / file).read_bytes()
    assert file == "pytorch_model.bin" and told["sha256"][file] == hashlib.sha256(content).hexdigest()
    (tmp_path / file).write_bytes(content)
    assert weights.origin(tmp_path / file) == {"sha256": told["sha256"]}  # a file of the user's
    refused = refusal(data.build("glue", task="rte").source)
    assert "is not cached and the hub fails (no connection to http" in refused
    assert all(way in refused for way in ("connect once", "data.root=FOLDER", "data=sentences"))
