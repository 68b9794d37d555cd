"""GLUE in three layouts."""

import csv
import json
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import nn

from helpers import CONF, ROOT, refusal
from helpers.texts import ready, tables, write_hub
from recombine import data
from recombine.data.text import glue, tokenised
from recombine.training import objectives


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
    assert "did you mean mrpc" in refusal(data.build, "glue", task="mprc")


@pytest.mark.parametrize("task, column", [
    ("mnli", "MNLI"), ("sst2", "SST-2"), ("mrpc", "MRPC"), ("cola", "CoLA"), ("qnli", "QNLI"), ("qqp", "QQP"),
    ("rte", "RTE"), ("stsb", "STS-B"),
])  # fmt: skip
def test_settings_are_those_of_cersas_table_13(task, column):
    with (ROOT / "experiments" / "cersa" / "tab13_hparams_deberta.csv").open(newline="") as file:
        told = {row["row"]: float(row["value"]) for row in csv.DictReader(file) if row["dataset"] == column}
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", ["experiment=cersa/tab08", f"data.task={task}"])
    assert cfg.model.name == "deberta_v3_base" and cfg.data.name == "glue" and len(told) == 7
    assert told == {
        "max_seq_len": cfg.data.max_length, "batch_size": cfg.data.batch_size, "epochs": cfg.trainer.epochs,
        "classifier_dropout": cfg.model.cls_dropout, "weight_decay": cfg.optim.weight_decay, "lr": cfg.optim.lr,
        "lr_classifier": cfg.optim.lr_head,
    }  # fmt: skip
