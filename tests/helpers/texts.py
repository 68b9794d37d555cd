"""Text models and tokenizers, tiny, and caches of texts."""

import io
import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import sentencepiece
import torch
import transformers

from helpers import config
from recombine import models
from recombine.data.text import base, glue
from recombine.errors import UsageError
from recombine.runtime import assets

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
