"""Text: models out of folders, packages and a hub; GLUE and the packaged tasks; padding changes nothing."""

import recombine  # isort: skip  (its guard comes before transformers)

import copy
import csv
import io
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.stats
import sentencepiece
import torch
import transformers
import yaml
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file, save_file
from torch import nn

from recombine import data, models
from recombine.core.calibration import KINDS, collect
from recombine.core.rewrite import find_sites
from recombine.data.text import base, glue, sentences, tokenised
from recombine.errors import UsageError
from recombine.models import packaged, roles
from recombine.models.hf_folder import model_files
from recombine.runner import ranks
from recombine.runtime import assets
from recombine.training import objectives

ROOT = Path(__file__).parents[1]
WORDS = ["the", "a", "cat", "dog", "sat", "on", "mat", "big", "small", "house", "tree", "river", "runs", "over", "red"]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A fresh cache of texts over the user's own cache of packages."""
    mine = assets.cache_dir() / "assets"
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "assets").symlink_to(mine)
    monkeypatch.setenv("RECOMBINE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def packages():
    def need(*names):
        try:
            return [assets.fetch(name) for name in names]
        except UsageError as error:
            pytest.skip(str(error))

    return need


def config(name: str, **overrides) -> dict:
    return yaml.safe_load((ROOT / "conf" / "model" / f"{name}.yaml").read_text()) | overrides


def refusal(call, *args, **kwargs) -> str:
    with pytest.raises(UsageError) as error:
        call(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def say(count: int, seed: int, least: int = 3, most: int = 15) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(least, most))) for _ in range(count)]


def ready(module, tokenizer):
    module.tokenizer = tokenizer
    module.prepare_data()
    module.setup()
    return module


@pytest.fixture(scope="module")
def bert():
    torch.manual_seed(0)
    model = models.build(**config("tiny_bert", num_classes=3)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


@pytest.fixture(scope="module")
def tokenizer(bert):
    return models.tokenizer(bert.recombine_source)


# Models


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


DEBERTA = dict(
    vocab_size=70,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    position_buckets=8,
)


@pytest.fixture(scope="module")
def deberta(tmp_path_factory) -> Path:
    """A folder as microsoft/deberta-v3-base lies on the hub: float16 .bin with the pretraining's heads, spm.model."""
    folder = tmp_path_factory.mktemp("hub") / "deberta"
    folder.mkdir()
    yaml_keys = {k: config("deberta_v3_base")[k] for k in ("relative_attention", "norm_rel_ebd", "share_att_key")}
    sizes = DEBERTA | yaml_keys | {"pos_att_type": "p2c|c2p", "position_biased_input": False, "layer_norm_eps": 1e-7}
    (folder / "config.json").write_text(json.dumps(sizes | {"model_type": "deberta-v2", "type_vocab_size": 0}))
    torch.manual_seed(1)
    backbone = transformers.DebertaV2Model(transformers.DebertaV2Config(**sizes)).state_dict()
    heads = {"lm_predictions.lm_head.bias": torch.zeros(70), "mask_predictions.dense.weight": torch.ones(32, 32)}
    state = {f"deberta.{name}": tensor for name, tensor in backbone.items()} | heads
    torch.save({name: tensor.half() for name, tensor in state.items()}, folder / "pytorch_model.bin")
    (folder / "spm.model").write_bytes(spm())
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": false, "vocab_type": "spm"}')
    return folder


def spm() -> bytes:
    out = io.BytesIO()
    special = {"pad": 0, "bos": 1, "eos": 2, "unk": 3}
    pieces = {"pad_piece": "[PAD]", "bos_piece": "[CLS]", "eos_piece": "[SEP]", "unk_piece": "[UNK]"}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(say(500, 0)), model_writer=out, vocab_size=60, hard_vocab_limit=False, minloglevel=2,
        **{f"{name}_id": i for name, i in special.items()}, **pieces,
    )  # fmt: skip
    return out.getvalue()


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
    assert "expected int, got str" in refusal(models.build, **config("tiny_bert", hidden_size="many"))
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


# Batches


class Toy(base.TextData):
    """Sentences of the tests' own."""

    name = group = "toy"
    classes, scores = ["a", "b"], ("acc", "balanced_acc")

    def __init__(self, rows=None, labels=None, test=None, **kwargs):
        super().__init__(**{"task": "toy", **kwargs})
        self.rows = [(s,) for s in say(90, 5)] if rows is None else rows
        self.labels = np.arange(len(self.rows)) % 2 if labels is None else labels
        self.tests = [(s,) for s in say(20, 6, 20, 25)] if test is None else test
        self.made = 0

    def identity(self):
        return "toy"

    def source(self):
        self.made += 1
        splits = {"train": (self.rows, self.labels), "test": (self.tests, np.arange(len(self.tests)) % 2)}
        return base.TextSource("MIT", splits)


@pytest.mark.parametrize("pair", [False, True])
def test_a_batch_is_what_the_tokenizer_pads(cache, tokenizer, pair):
    rows = list(zip(say(40, 7), say(40, 8), strict=True)) if pair else [(s,) for s in say(40, 7)]
    module = ready(Toy(rows, test=rows[:9], select="last", max_length=60), tokenizer)
    batch = module.train.__getitems__([3, 17, 5])
    columns = [[rows[i][c] for i in (3, 17, 5)] for c in range(len(rows[0]))]
    expected = tokenizer(*columns, truncation=True, max_length=60, padding=True, return_tensors="pt")
    if not pair:
        del expected["token_type_ids"]  # all zeros, which is what a model takes for none
    assert batch.pop("labels").tolist() == [1, 1, 1]
    assert batch.keys() == expected.keys() and all(torch.equal(batch[key], expected[key]) for key in batch)
    assert module.info["cut_to_max_length"]["train"] == sum(len(tokenizer(*row)["input_ids"]) > 60 for row in rows) > 0
    assert module.sample()["input_ids"].shape == (1, np.sort(module.train.lengths)[20])


def test_buckets_pad_little_and_drop_nothing(cache, tokenizer):
    def epochs(bucket, seed=0, count=2):
        module = ready(Toy(batch_size=8, bucket=bucket, seed=seed, select="last"), tokenizer)
        loader = module.train_dataloader()
        return [[b["input_ids"].tolist() for b in loader] for _ in range(count)], list(loader)

    (first, second), batches = epochs(8)
    assert first != second and epochs(8)[0] == [first, second] and epochs(8, seed=1)[0][0] != first
    rows = lambda epoch: sorted(tuple(i for i in row if i) for batch in epoch for row in batch)  # noqa: E731
    assert rows(first) == rows(second) and len(rows(first)) == 90
    padding = lambda some: 1 - sum(b["attention_mask"].sum() for b in some) / sum(b["input_ids"].numel() for b in some)  # noqa: E731
    assert padding(batches) < 0.5 * padding(epochs(1)[1])
    module = ready(Toy(batch_size=8), tokenizer)
    assert padding(list(module.test_dataloader())) < 0.06 and len(module.val) == 9


def test_two_ranks_share_an_epoch(cache, tokenizer):
    """Each rank takes its rows of every batch, so that together they see the very batches of one."""
    module = ready(Toy(batch_size=8, select="last"), tokenizer)
    spelt = lambda batch: [tuple(i for i in row if i) for row in batch["input_ids"].tolist()]  # noqa: E731
    alone, parts = [spelt(batch) for batch in module.train_dataloader()], []
    for rank in range(2):
        module.trainer = SimpleNamespace(global_rank=rank, world_size=2)
        parts.append([spelt(batch) for batch in module.train_dataloader()])
    assert [sorted(one + two) for one, two in zip(*parts, strict=True)] == [sorted(batch) for batch in alone]
    assert len(alone) == 12 and sum(map(len, parts[0])) == sum(map(len, parts[1])) == 45


def test_tokenised_once(cache, tokenizer, packages):
    module = Toy()
    ready(module, tokenizer)
    ready(module, tokenizer)
    assert module.made == 1 and ready(Toy(seed=5, select="test"), tokenizer).made == 0
    module.path.write_bytes(module.path.read_bytes()[:-8])  # cut short
    assert ready(module, tokenizer).made == 2
    assert ready(Toy(max_length=64), tokenizer).path != module.path


def test_select(cache, tokenizer):
    val, test, last = (ready(Toy(select=how), tokenizer) for how in ("val", "test", "last"))
    assert [len(val.train), len(val.val), len(val.test)] == [81, 9, 20]

    def whole(*parts):
        return sorted(tuple(p.ids[a : a + n]) for p in parts for a, n in zip(p.starts, p.lengths, strict=True))

    assert whole(val.train, val.val) == whole(last.train) and np.bincount(val.val.labels).tolist() in ([4, 5], [5, 4])
    assert test.val is test.test and len(test.train) == 90 and "on test itself" in test.info["protocol"]
    assert last.val is None and last.val_dataloader() == [] and "last epoch" in last.info["protocol"]
    other = ready(Toy(seed=1), tokenizer)
    assert whole(other.val) != whole(val.val)
    assert "data.select=best" in refusal(Toy, select="best")


def test_what_is_wrong_with_the_data_is_said(cache, tokenizer, capsys):
    rows = [(s,) for s in say(12, 9)]
    assert "row 3: label 2 is out of range" in refusal(ready, Toy(rows, np.array([0, 1, 0, 2] * 3)), tokenizer)
    assert "has no 'b'" in refusal(ready, Toy(rows, np.zeros(12, int)), tokenizer)
    assert "is empty" in refusal(ready, Toy(rows, test=[]), tokenizer)
    module = ready(Toy(rows, test=[*rows[4:6], ("quite new",)]), tokenizer)
    assert module.info["shared_train_test"] == 2 and module.info["first_shared"] == [4, 0]
    assert "2 rows of train are in test too, the first is row 4 of train and 0 of test" in capsys.readouterr().err
    assert "at most 128 tokens" in refusal(ready, Toy(max_length=256), tokenizer)
    assert "no tokenizer" in refusal(Toy().prepare_data)
    assert "data.batch_size=0" in refusal(Toy, batch_size=0)


@pytest.mark.parametrize("name", ["bert", "deberta"])
def test_padding_changes_nothing(name, bert, deberta, tokenizer):
    """Neither the logits nor any calibration statistic, in float64."""
    model = copy.deepcopy(bert)
    if name == "deberta":
        model = models.build(**config("deberta_v3_base", **DEBERTA, checkpoint=deberta, num_classes=3))
        tokenizer = models.tokenizer(model.recombine_source)
    model = model.double().eval()
    told = say(4, 10)
    one = lambda t: dict(tokenizer(t, return_tensors="pt")) | {"labels": torch.tensor([len(t) % 3])}  # noqa: E731
    padded = dict(tokenizer(told, padding=True, return_tensors="pt"))
    padded |= {"labels": torch.tensor([len(t) % 3 for t in told])}
    assert not padded["attention_mask"].all()
    task = objectives.Classification(3)
    with torch.no_grad():
        apart = torch.cat([objectives.call(model, one(t)) for t in told])
        assert torch.allclose(objectives.call(model, padded), apart, atol=1e-12)

    sites = find_sites(model, recombine.Svd(targets=("qkv", "o", "up", "down")))
    wider = dict(tokenizer(told, padding="max_length", max_length=100, return_tensors="pt"))
    wider |= {"labels": padded["labels"]}
    tight, wide = (collect(model, sites, lambda x=x: [task.loss(model, x)[0]], set(KINDS)) for x in (padded, wider))
    for site in sites:
        a, b = tight[site.name], wide[site.name]
        assert a.tokens == b.tokens == a.inputs.tokens == b.inputs.tokens
        if name == "bert" or site.role in (
            "v",
            "o",
            "up",
            "down",
        ):  # DeBERTa's q and k also read its relative positions
            assert a.tokens == padded["attention_mask"].sum()
        for key in ("gg", "gx", "fisher"):
            x, y = getattr(a, key), getattr(b, key)
            assert torch.allclose(x, y, rtol=1e-9, atol=1e-15) and x.abs().max() > 0
        assert torch.allclose(a.inputs.xx, b.inputs.xx, rtol=1e-9, atol=1e-14)
        assert torch.allclose(a.inputs.absolute, b.inputs.absolute, rtol=1e-9, atol=1e-14)


def test_metrics_are_scipys():
    rng = np.random.default_rng(0)
    y, values = rng.random(50), rng.random(50)
    made = glue.Glue(task="stsb").metrics()
    made.update(torch.tensor(values), torch.tensor(y))
    made.update(torch.tensor(y[:9]), torch.tensor(values[:9]))
    a, b = np.r_[values, y[:9]], np.r_[y, values[:9]]
    assert made.compute()["pearson"].item() == pytest.approx(scipy.stats.pearsonr(a, b).statistic, abs=1e-6)
    assert made.compute()["spearman"].item() == pytest.approx(scipy.stats.spearmanr(a, b).statistic, abs=1e-6)
    labels, guesses = rng.integers(0, 2, 60), rng.integers(0, 2, 60)
    cola, mrpc = glue.Glue(task="cola"), glue.Glue(task="mrpc")
    scores = {}
    for module in (cola, mrpc):
        metrics = module.metrics()
        metrics.update(nn.functional.one_hot(torch.tensor(guesses), 2).float(), torch.tensor(labels))
        scores |= {name: value.item() for name, value in metrics.compute().items()}
    tp, fp, fn = ((guesses & labels).sum(), (guesses & 1 - labels).sum(), (1 - guesses & labels).sum())
    assert scores["mcc"] == pytest.approx(np.corrcoef(labels, guesses)[0, 1], abs=1e-6) and cola.metric == "mcc"
    assert scores["f1"] == pytest.approx(2 * tp / (2 * tp + fp + fn)) and mrpc.metric == "acc"
    assert scores["acc"] == pytest.approx((labels == guesses).mean())


# GLUE


def tables(task: str) -> dict[str, datasets.Dataset]:
    """What the hub's splits hold: the same columns and features, 60 rows of train, 20 of each validation set."""
    row, features = glue.TASKS[task], {}
    features = {column: datasets.Value("string") for column in row.columns}
    features["label"] = datasets.ClassLabel(names=list(row.classes)) if row.classes else datasets.Value("float32")
    features["idx"] = datasets.Value("int32")
    made = {}
    for seed, split in enumerate((*row.sizes, "test")):
        count = 60 if split == "train" else 20
        columns = {column: say(count, 100 * seed + i) for i, column in enumerate(row.columns)}
        labels = [i % len(row.classes) if row.classes else i / 4 for i in range(count)]
        columns |= {"label": [-1] * count if split == "test" else labels, "idx": list(range(count))}
        made[split] = datasets.Dataset.from_dict(columns, datasets.Features(features))
    return made


def write_hub(root: Path, task: str) -> None:
    """As nyu-mll/glue lies on the hub."""
    folder = root / (glue.TASKS[task].folder or task)
    folder.mkdir(parents=True)
    for split, table in tables(task).items():
        table.to_parquet(folder / f"{split}-00000-of-00001.parquet")


@pytest.mark.parametrize("task", glue.TASKS)
def test_glue_in_three_layouts(cache, tokenizer, tmp_path, task, capsys):
    row, inside, made = glue.TASKS[task], glue.TASKS[task].folder or task, tables(task)
    write_hub(tmp_path / "clone", task)
    for split, table in made.items():
        (tmp_path / "converted" / inside / split).mkdir(parents=True)
        table.to_parquet(tmp_path / "converted" / inside / split / "0000.parquet")
    datasets.DatasetDict(made).save_to_disk(tmp_path / "saved" / inside)

    def load(root):
        module = data.build("glue", task=task, root=tmp_path / root, batch_size=8)
        return ready(module, tokenizer)

    one = load("clone")
    digests = one.info["sha256"]
    assert (
        load("converted").info["sha256"]
        == digests
        == load("saved").info["sha256"]
        == load(f"clone/{inside}").info["sha256"]
    )
    tests = [split for split in row.sizes if split != "train"]
    assert [len(one.train), len(one.val), len(one.test)] == [54, 6, 20 * len(tests)] and one.select == "val"
    told = one.tokenizer.decode(one.test.__getitems__([0])["input_ids"][0], skip_special_tokens=True)
    assert told == "".join(made[tests[0]][0][column] for column in row.columns)
    last = one.test.__getitems__([len(one.test) - 1])
    assert ("token_type_ids" in last) == (len(row.columns) == 2)
    expected = made[tests[-1]][19]["label"]
    assert last["labels"].item() == expected and last["labels"].dtype == (torch.int64 if row.classes else torch.float32)
    assert one.objective == ("classification" if row.classes else "regression")
    assert one.num_classes == max(1, len(row.classes)) and one.metrics().keys() == set(row.scores)
    assert f"train has 60 rows, GLUE's has {row.sizes['train']}" in capsys.readouterr().err
    assert json.loads(json.dumps(one.info)) == one.info and all(split in one.info["note"] for split in tests)


def test_mnli_is_scored_on_both_sets(cache, tokenizer, tmp_path):
    """One run has both accuracies and their mean, however rows fall into batches and ranks."""
    write_hub(tmp_path, "mnli")
    both, one, two = (
        ready(data.build("glue", task=task, root=tmp_path, batch_size=7), tokenizer)
        for task in ("mnli", "mnli_matched", "mnli_mismatched")
    )
    joined = tokenised.join(one.test, two.test)
    assert np.array_equal(joined.ids, both.test.ids) and np.array_equal(joined.labels, both.test.labels)
    batch, bare = both.test.__getitems__([0, 19, 20, 39]), joined.__getitems__([0, 19, 20, 39])
    assert batch.pop("part").tolist() == [0, 0, 1, 1] and all(torch.equal(batch[key], bare[key]) for key in bare)
    assert both.metric == "m+mm" and one.metric == "acc" and "part" not in both.val.__getitems__([0])

    guess = lambda b: nn.functional.one_hot(b["input_ids"].sum(1) % 3, 3).float()  # noqa: E731
    whole, ranks, right = both.metrics(), [both.metrics(), both.metrics()], {0: [], 1: []}
    for i, batch in enumerate(both.test_dataloader()):
        some = (batch["part"] == 0) | (batch["labels"] > 0)  # parts of two sizes: their mean is not that of all rows
        batch = {key: value[some] for key, value in batch.items()}
        for metrics in (whole, ranks[i % 2]):
            metrics.update(guess(batch), batch["labels"], **objectives.parts_of(batch))
        for part, hit in zip(batch["part"].tolist(), guess(batch).argmax(1) == batch["labels"], strict=True):
            right[part].append(hit.item())
    m, mm = (np.mean(right[part]) for part in (0, 1))
    expected = {"acc_m": m, "acc_mm": mm, "m+mm": (m + mm) / 2, "acc": np.mean(right[0] + right[1])}
    assert len(right[0]) == 20 and len(right[1]) == 13 and m != mm
    assert {k: v.item() for k, v in whole.compute().items()} == pytest.approx(expected)
    for name in ("acc_m", "acc_mm", "m+mm"):  # what two ranks sum up is the same
        first, second = (rank[name] for rank in ranks)
        first.rows, first.right = first.rows + second.rows, first.right + second.right
        assert first.compute().item() == pytest.approx(expected[name])
    unparted = both.metrics()  # a set without parts, as the tenth of train
    unparted.update(guess(batch), batch["labels"])
    found = unparted.compute()
    assert found["m+mm"] == found["acc_m"] == found["acc"] and found["acc_mm"].isnan()
    few = ready(data.build("glue", task="mnli", root=tmp_path, limit=6), tokenizer)
    assert np.bincount(few.test.parts).tolist() == [6, 6] and few.info["sizes"]["test"] == 12


def test_glue_files_that_are_wrong(cache, tokenizer, tmp_path):
    def broken(change, task="mrpc", split="train") -> str:
        root = tmp_path / str(len(list(tmp_path.iterdir())))
        write_hub(root, task)
        path = root / task / f"{split}-00000-of-00001.parquet"
        change(path)
        return refusal(ready, data.build("glue", task=task, root=root), tokenizer)

    def edit(make):
        return lambda path: pq.write_table(make(pq.read_table(path)), path)

    def label(values, kind="int64"):
        return edit(lambda t: t.set_column(t.column_names.index("label"), "label", pa.array(values(t), kind)))

    assert "cannot read" in broken(lambda path: path.write_bytes(path.read_bytes()[:-40]))
    assert "no column 'sentence2'" in broken(edit(lambda t: t.drop_columns(["sentence2"])))
    assert "label -1 is out of range" in broken(label(lambda t: [-1] * len(t)), split="validation")
    assert "has no 'equivalent'" in broken(label(lambda t: [0] * len(t)))
    assert "must be class numbers" in broken(label(lambda t: [0.5] * len(t), pa.float32()))
    assert "must be real" in broken(label(lambda t: [1] * len(t)), task="stsb")
    assert "1 empty cells" in broken(label(lambda t: [None] + [1] * (len(t) - 1)))

    def swap(table):
        told = table.schema.metadata[b"huggingface"]
        names = b'"not_equivalent", "equivalent"', b'"equivalent", "not_equivalent"'
        return table.replace_schema_metadata({b"huggingface": told.replace(*names)})

    assert "numbers its classes equivalent, not_equivalent" in broken(edit(swap))
    assert "no validation in" in broken(Path.unlink, split="validation")
    assert "did you mean 'mrpc'" in refusal(data.build, "glue", task="mprc")


@pytest.mark.parametrize("task, column", [
    ("mnli", "MNLI"), ("sst2", "SST-2"), ("mrpc", "MRPC"), ("cola", "CoLA"), ("qnli", "QNLI"), ("qqp", "QQP"),
    ("rte", "RTE"), ("stsb", "STS-B"),
])  # fmt: skip
def test_settings_are_those_of_cersas_table_13(task, column):
    with (ROOT / "experiments" / "cersa" / "tab13_hparams_deberta.csv").open(newline="") as file:
        told = {row["row"]: float(row["value"]) for row in csv.DictReader(file) if row["dataset"] == column}
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", ["experiment=cersa/tab08", f"data.task={task}"])
    assert cfg.model.name == "deberta_v3_base" and cfg.data.name == "glue" and len(told) == 7
    assert told == {
        "max_seq_len": cfg.data.max_length, "batch_size": cfg.data.batch_size, "epochs": cfg.trainer.epochs,
        "classifier_dropout": cfg.model.cls_dropout, "weight_decay": cfg.optim.weight_decay, "lr": cfg.optim.lr,
        "lr_classifier": cfg.optim.lr_head,
    }  # fmt: skip


# The packaged tasks


@pytest.mark.parametrize("task", [*sentences.SUITE, *sentences.SHIFTS])
def test_packaged_tasks_are_the_pinned_ones(task, cache, packages, tokenizer, monkeypatch):
    packages("wordnet" if task == "gloss_match" else "vader")
    module = ready(data.build("sentences", task=task), tokenizer)  # refuses another sha256 by itself
    assert [len(module.train), len(module.val), len(module.test)] == pytest.approx([4000, 1000, 2000], rel=0.02)
    assert module.info["shared_train_test"] == 0 and module.info["licence"]
    if module.classes:
        assert all(0.3 < part.labels.mean() < 0.75 for part in (module.train, module.val, module.test))
    monkeypatch.setitem(sentences.PINS, task, "0" * 16)
    assert "expected 0000000000000000" in refusal(ready, data.build("sentences", task=task), tokenizer)


def test_gloss_match_has_no_one_sided_answer(packages):
    packages("wordnet")
    source = sentences.gloss_match()
    for rows, labels in source.splits.values():
        for side in range(2):  # every definition and every example: once in a match, once not
            seen = {}
            for row, label in zip(rows, labels, strict=True):
                seen.setdefault(row[side], []).append(label)
            assert all(sorted(found) == [0, 1] for found in seen.values())
        matches = [row for row, label in zip(rows, labels, strict=True) if label]
        assert not any(sentences.stems(definition) & sentences.stems(example) for definition, example in matches)
    apart = [{part for row in rows for part in row} for rows, _ in source.splits.values()]
    assert not apart[0] & apart[1] and not apart[0] & apart[2] and not apart[1] & apart[2]
    truth = {(definition, example) for _, _, definition, examples in sentences.senses() for example in examples}
    rows, labels = source.splits["test"]
    assert all((row in truth) == bool(label) for row, label in zip(rows, labels, strict=True))


def test_a_model_learns_and_comes_back(cache, tokenizer, tmp_path):
    """LoRA on a task of one word, through the module's own loaders and metrics."""
    rows = [(s,) for s in say(120, 11, 3, 6)]
    labels = np.array(["cat" in row[0].split() for row in rows]).astype(int)
    module = ready(Toy(rows, labels, test=rows[:20], batch_size=16, max_length=48, select="test"), tokenizer)
    torch.manual_seed(0)
    model = models.build(**config("tiny_bert"))
    models.reset_head(model, module.num_classes)
    pretrained = copy.deepcopy(model)
    recombine.apply(model, recombine.Peft(targets=("q", "k", "v"), rank=4, options={"lora_alpha": 8}))
    task, loader = objectives.build(module), module.train_dataloader()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)

    def epoch() -> float:
        total = 0.0
        for batch in loader:
            loss, _ = task.loss(model, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        return total

    history = [epoch() for _ in range(3)]
    assert history[-1] < history[0]
    recombine.save(model, tmp_path / "lora.safetensors")
    loaded = recombine.load(tmp_path / "lora.safetensors", pretrained).eval()
    batch = module.test.__getitems__([0, 5])
    with torch.no_grad():
        assert torch.equal(objectives.call(loaded, batch), objectives.call(model.eval(), batch))


@pytest.mark.parametrize("name, task, metric", [
    ("glue", "cola", "mcc"), ("glue", "stsb", "pearson"), ("glue", "mnli", "m+mm"), ("sentences", "sentiment", "acc"),
])  # fmt: skip
def test_one_code_path_for_all(cache, packages, tmp_path, name, task, metric):
    """run.py's own way from a command line to result.json, and back from the checkpoint."""
    if name == "glue":
        write_hub(tmp_path / "glue", task)
        where = [f"data.root={tmp_path / 'glue'}"]
    else:
        packages("vader")
        where = ["data.limit=40"]

    def one(*more: str, out: str) -> dict:
        said = ["model=tiny_bert", f"data={name}", f"data.task={task}", *where, "trainer=cpu", *more]
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            cfg = compose("config", [*said, "trainer.epochs=2", "trainer.progress=false", "calibration.samples=8"])
        ranks.main(cfg, tmp_path / out)
        return json.loads((tmp_path / out / "result.json").read_text())

    result = one("method=lora", out="lora")
    assert metric in result["val"] and result["test"].keys() >= {"loss", metric}
    assert result["data"]["metric"] == metric and result["linear_probe"] and result["account"]["flops"] > 0
    again = one("method=lora", "stage=evaluate", f"stage.checkpoint={result['checkpoint']}", out="again")
    assert again["test"] == pytest.approx(result["test"], nan_ok=True)
    assert one("stage=retrofit", "method=svd_llm", "method.ratio=0.5", out="svd")["logit_error"] > 0
