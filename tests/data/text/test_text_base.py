"""Batches of text: padding changes nothing, and metrics are scipy's."""

import recombine  # isort: skip  (its guard comes before transformers)

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch
from torch import nn

from helpers import config, refusal
from helpers.texts import DEBERTA, Toy, ready, say
from recombine import models
from recombine.core.calibration import KINDS, collect
from recombine.core.rewrite import find_sites
from recombine.data.text import glue
from recombine.runtime.schema import checked
from recombine.training import objectives


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
    assert "data.select=best" in refusal(checked, Toy, {"task": "toy", "select": "best"}, "data")


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
    assert "data.batch_size=0" in refusal(checked, Toy, {"task": "toy", "batch_size": 0}, "data")


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
