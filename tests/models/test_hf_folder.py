"""Text models out of folders, packages and a hub."""

import recombine  # isort: skip  (its guard comes before transformers)

import json
import subprocess
import sys

import numpy as np
import pytest
import sentencepiece
import torch
import transformers
from safetensors.torch import load_file, save_file

from helpers import ROOT, config, refusal
from helpers.texts import DEBERTA, write_hub
from recombine import models
from recombine.core.rewrite import find_sites
from recombine.data.text import glue
from recombine.models import packaged, roles
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


HUB = """
import hashlib, http.server, json, os, sys, threading
from pathlib import Path

roots, revisions = json.loads(sys.argv[1]), json.loads(sys.argv[2])

class Hub(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        path = self.path.partition("?")[0].removeprefix("/api/models").removeprefix("/api").lstrip("/")
        repo = next((repo for repo in roots if path.startswith(repo)), None)
        if repo is None:
            body = b""
        elif "/resolve/" in path:
            body = (Path(roots[repo]) / path.split(f"/resolve/{revisions[repo]}/")[1]).read_bytes()
        else:
            files = [p for p in sorted(Path(roots[repo]).rglob("*")) if p.is_file()]
            names = [str(p.relative_to(roots[repo])) for p in files]
            tree = [{"type": "file", "path": n, "size": p.stat().st_size, "oid": "0"} for n, p in zip(names, files)]
            info = {"id": repo, "sha": revisions[repo], "siblings": [{"rfilename": n} for n in names]}
            body = json.dumps(tree if "/tree/" in path else info).encode()
        self.send_response(200)
        for key, value in {
            "Content-Length": len(body), "ETag": hashlib.sha256(body).hexdigest(),
            "X-Repo-Commit": revisions.get(repo),
        }.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *args):
        pass

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"

import recombine
from recombine import data, models

for _ in range(2):  # the second time out of the cache
    model = models.build(**json.loads(sys.argv[3]))
    module = data.build("glue", task="mrpc", select="test")
    module.attach_model(**models.for_data(model.recombine_source))
    module.prepare_data()
    module.setup()
    server.shutdown()
    server.server_close()
print(module.info["note"], len(module.train), len(module.test))
try:
    data.build("glue", task="rte").source()
except recombine.UsageError as error:
    print(error)
"""


def test_a_hub_that_answers_and_one_that_does_not(deberta, tmp_path):
    """The hub's own client against a server that speaks as the hub does: download, cache, and no network."""
    write_hub(tmp_path / "glue", "mrpc")
    source = config("deberta_v3_base", **DEBERTA)
    roots = {source["id"]: str(deberta), "datasets/nyu-mll/glue": str(tmp_path / "glue")}
    revisions = {source["id"]: source["revision"], "datasets/nyu-mll/glue": glue.REVISION}
    places = {"HF_HUB_CACHE": str(tmp_path / "hub"), "RECOMBINE_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", HUB, *map(json.dumps, (roots, revisions, source))],
        env={"PATH": "", "HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_PROGRESS_BARS": "1", **places},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    first, refused = done.stdout.strip().splitlines()
    assert f"nyu-mll/glue@{glue.REVISION[:8]}" in first and first.endswith("60 20")
    assert "is not cached and the hub fails" in refused
    assert all(way in refused for way in ("connect once", "data.root=FOLDER", "data=sentences"))
