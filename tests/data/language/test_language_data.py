"""Language data: packing, prompts, choices and every refusal."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers import refusal
from helpers.llamas import line, loaded, rows, write
from recombine import data
from recombine.data import hub
from recombine.data.base import SPLITS
from recombine.data.language import choices, instructions, prompts, text
from recombine.evaluation import harness
from recombine.models import causal_lm


def test_text_is_packed(toy_packages, byte_tokenizer):
    module = loaded("text", byte_tokenizer, task="wiki", max_length=16)
    whole = "</s>".join(a["extract"] for a in choices.articles()["test"]) + "</s>"
    batch = module.test.__getitems__([0, 1, 2])
    assert (
        byte_tokenizer.decode(batch["input_ids"].flatten())
        == whole[: len(byte_tokenizer.decode(batch["input_ids"].flatten()))]
    )
    assert batch["input_ids"].shape == (3, 16) and torch.equal(batch["labels"], batch["input_ids"])
    assert module.info["sizes"]["train"] == len(module.train) and json.dumps(module.info)
    few = loaded("text", byte_tokenizer, task="wiki", max_length=16, limit=2)
    assert torch.equal(few.train.ids, module.train.ids[:2])
    order = [batch["input_ids"] for batch in module.train_dataloader()]
    again = [batch["input_ids"] for batch in module.train_dataloader()]
    assert all(map(torch.equal, order, again)) and not torch.equal(torch.cat(order), module.train.ids)


def test_the_prompt_is_masked(byte_tokenizer):
    rows = [("ask: ", "yes"), ("a longer question: ", "no")]
    batch = instructions.Instructions(rows, byte_tokenizer, 64, loss_on_prompt=False).__getitems__([0, 1])
    learnt = [byte_tokenizer.decode(labels[labels != -100]) for labels in batch["labels"]]
    assert learnt == ["yes</s>", "no</s>"]
    assert batch["attention_mask"].sum(1).tolist() == [len("ask: yes") + 1, len("a longer question: no") + 1]
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    batch = instructions.Instructions(rows, byte_tokenizer, 64, loss_on_prompt=True).__getitems__([0])
    assert torch.equal(batch["labels"], batch["input_ids"])


def test_what_is_too_long_keeps_something_to_learn(byte_tokenizer):
    row = [("ask: ", "yes"), ("x" * 50 + ": ", "yes"), ("ask: ", "y" * 50)]
    cut = instructions.Instructions(row, byte_tokenizer, 16, loss_on_prompt=False)
    for i, (prompt, response) in enumerate([("ask: ", "yes</s>"), ("x" * 10 + ": ", "yes</s>"), (" ", "y" * 15)]):
        batch = cut.__getitems__([i])
        labels = batch["labels"][0]
        assert byte_tokenizer.decode(labels[labels != -100]) == response
        assert byte_tokenizer.decode(batch["input_ids"][0]) == prompt + response
    whole = instructions.Instructions(row, byte_tokenizer, 16, loss_on_prompt=True).__getitems__([1])
    assert byte_tokenizer.decode(whole["labels"][0]) == "x" * 16


def test_a_token_across_the_border_belongs_to_the_response():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE({t: i for i, t in enumerate(["a", "b", "ab", "e"])}, [("a", "b")]))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    merged = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="e", pad_token="e")
    labels = instructions.Instructions([("a a", "b b")], merged, 8, loss_on_prompt=False).__getitems__([0])["labels"]
    assert merged.convert_ids_to_tokens(labels[0][1:]) == ["ab", "b", "e"] and labels[0][0] == -100


def test_prompts_are_the_papers():
    lines = prompts.alpaca("Is it?\n\nAnswer format: true/false").split("\n")
    assert lines[0].rstrip().endswith("appropriately completes the request.") and lines[1] == lines[-1] == ""
    assert [row.strip() for row in lines[2:-1]] == [
        "### Instruction:", "Is it?", "", "Answer format: true/false", "", "### Response:"
    ]  # fmt: skip
    assert lines[3].startswith(16 * " " + "Is")
    assert prompts.metamath("Q").endswith("### Instruction:\nQ\n\n### Response: Let's think step by step.")


def test_choices(toy_packages, byte_tokenizer):
    module = loaded("choices", byte_tokenizer, task="wiki_description")
    assert module.harness == choices.TASKS and not set(module.train.rows) & set(module.test.rows)
    for task in choices.TASKS:
        for split in SPLITS:
            for item in choices.items(task, split):
                assert len(set(item["options"])) == 4
                assert not any(choices.stems(item["question"]) & choices.stems(o) for o in item["options"])
    capital = {i["question"]: i["options"][i["answer"]] for i in choices.items("capital_of", "test")}
    assert capital == {"Oz": "Aa", "Uz": "Bb", "Iz": "Cc", "Ez": "Dd"} and not choices.items("capital_of", "train")
    words = {split: {i["question"] for i in choices.items("wordnet_definition", split)} for split in choices.WORDS}
    assert [len(words[split]) for split in choices.WORDS] == [8, 4, 10] and not words["train"] & words["test"]
    assert choices.stems("The lions of Judah") == {"lions", "judah"}
    assert "data.task=capital_of: there is no such choices task" in line(data.build, "choices", task="capital_of")


@pytest.mark.parametrize("file", ["commonsense_170k.json", "data/train-00000-of-00001.parquet"])
def test_commonsense_from_a_folder(tmp_path, byte_tokenizer, file):
    write(tmp_path / file, rows(40))
    module = loaded("commonsense", byte_tokenizer, task="commonsense_170k", root=tmp_path, loss_on_prompt=True)
    assert [len(getattr(module, split)) for split in SPLITS] == [32, 4, 4]
    assert module.harness == harness.COMMONSENSE and len(module.harness) == 8
    prompt, response = module.train.rows[0]
    assert "### Instruction" in prompt and response.strip().startswith("the correct answer is")
    everything = {row for split in SPLITS for row in getattr(module, split).rows}
    assert len(everything) == 40
    for name in module.sets:
        write(tmp_path / name / "test.json", rows(2))
    assert module.harness == tuple(harness.FILES)


def test_files_are_read_once_for_a_tokenizer(tmp_path, byte_tokenizer):
    path = write(tmp_path / "commonsense_170k.json", rows(40))
    module = loaded("commonsense", byte_tokenizer, task="commonsense_170k", root=tmp_path)
    path.unlink()
    module.setup("fit")  # Lightning's own calls
    assert len(module.train) == 32 and module.info["root"] == str(tmp_path)
    module.tokenizer = causal_lm.byte_tokenizer()
    assert "commonsense_170k.json" in refusal(module.setup)


def test_metamath_and_gsm8k(tmp_path, byte_tokenizer, toy_packages):
    found = [
        {"type": "GSM_AnsAug", "query": f"{i}?", "original_question": f"{i}?", "response": f"The answer is: {i}"}
        for i in range(30)
    ]
    write(tmp_path / "MetaMathQA-395K.json", found)
    module = loaded("gsm8k", byte_tokenizer, task="metamath", root=tmp_path)
    assert [len(getattr(module, split)) for split in SPLITS] == [24, 3, 3]
    assert module.test.rows[0][0] == prompts.metamath("1 + 1?") and module.harness == ("gsm8k_metamath",)


def test_wikitext(tmp_path, byte_tokenizer):
    for split in ("train", "validation", "test"):
        cells = [{"text": ""}, {"text": f" = {split} = \n"}, {"text": "A sentence . \n" * 9}]
        write(tmp_path / "wikitext-2-raw-v1" / f"{split}-00000-of-00001.parquet", cells)
    module = loaded("text", byte_tokenizer, task="wikitext2", root=tmp_path, max_length=16)
    assert byte_tokenizer.decode(module.val.ids[0]) == "\n\n = validation = \n"[:16]


def test_c4_is_a_stream(tmp_path, byte_tokenizer, monkeypatch, offline):
    """Read no further than the windows need: a file that breaks off later is as good as a whole one."""
    monkeypatch.setattr(text, "PORTION", 3)
    files = {"train": "en/c4-train.00000-of-01024.json.gz", "validation": "en/c4-validation.00000-of-00008.json.gz"}
    noise = "".join(map(chr, np.random.default_rng(0).integers(97, 123, 40_000)))  # which gzip cannot shorten
    (tmp_path / "en").mkdir()
    for split, file in files.items():
        cells = [
            {"text": f"{split} {i} " + noise[100 * i : 100 * i + 100], "timestamp": "2019", "url": "a"}
            for i in range(400)
        ]
        packed = gzip.compress("".join(json.dumps(cell) + "\n" for cell in cells).encode())
        (tmp_path / file).write_bytes(packed[: len(packed) // 2])
    module = loaded("text", byte_tokenizer, task="c4", root=tmp_path, max_length=50, limit=20)
    told = {split: byte_tokenizer.decode(getattr(module, split).ids.flatten()) for split in ("train", "val", "test")}
    assert told["train"].startswith("train 0 ") and "</s>train 8 " in told["train"] and len(module.train) == 20
    assert told["test"].startswith("validation 0 ") and "</s>validation 2 " in told["test"]
    assert told["val"].startswith("validation 1 ") and "validation 2 " not in told["val"]
    assert module.info["shared_train_test"] == 0 and "allenai/c4@1588ec45" in module.info["note"]
    assert "cannot read" in line(loaded, "text", byte_tokenizer, task="c4", root=tmp_path, max_length=50, limit=10**6)
    assert "data.limit=null" in line(data.build, "text", task="c4")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    assert "allenai/c4 is not cached" in line(loaded, "text", byte_tokenizer, task="c4", limit=1)
    (tmp_path / files["train"]).write_bytes(gzip.compress(b'{"txt": "x"}\n'))
    assert "row 0 has no column 'text'" in line(loaded, "text", byte_tokenizer, task="c4", root=tmp_path, limit=1)
    (tmp_path / files["train"]).unlink()
    assert "c4-train.00000-of-01024.json.gz: put it there" in line(
        loaded, "text", byte_tokenizer, task="c4", root=tmp_path, limit=1
    )


def test_packing_takes_no_more_documents_than_it_needs(byte_tokenizer, monkeypatch):
    monkeypatch.setattr(text, "PORTION", 2)
    taken = []
    endless = (taken.append(i) or "seven b" for i in iter(int, 1))
    assert text.pack(byte_tokenizer, endless, 16, 4).shape == (4, 16) and len(taken) == 8  # 8 tokens each
    assert text.pack(byte_tokenizer, ["seven b"] * 5, 16, None).shape == (2, 16)
    assert text.pack(byte_tokenizer, ["seven b"], 16, 4).shape == (0, 16)


def test_rows_of_train_that_are_in_test_are_said(tmp_path, byte_tokenizer, toy_packages, capsys):
    asked = [{"query": f"{i} + 1?", "response": "so"} for i in range(40)]  # the test asks 1 + 1?
    write(tmp_path / "MetaMathQA-395K.json", asked)
    module = loaded("gsm8k", byte_tokenizer, task="metamath", root=tmp_path)
    at = [prompt for prompt, _ in module.train.rows].index(prompts.metamath("1 + 1?"))
    assert module.info["shared_train_test"] == 1 and module.info["first_shared"] == (at, 0)
    assert f"1 rows of train are in test too, the first is row {at} of train and 0 of test" in capsys.readouterr().err
    assert loaded("choices", byte_tokenizer, task="wiki_description").info["shared_train_test"] == 0


@pytest.mark.parametrize("name, task, file", [
    ("text", "wikitext2", "wikitext-2-raw-v1/train-00000-of-00001.parquet"),
    ("commonsense", "commonsense_170k", "commonsense_170k.json"), ("gsm8k", "metamath", "MetaMathQA-395K.json"),
])  # fmt: skip
def test_files_that_will_not_do_are_refused_in_a_line(tmp_path, byte_tokenizer, name, task, file, offline, monkeypatch):
    load = lambda **kwargs: loaded(name, byte_tokenizer, task=task, **kwargs)  # noqa: E731
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    said = line(load)
    assert all(way in said for way in ("connect once", "data.root=FOLDER", "take data")) and len(said) < 500
    assert "is no folder" in line(load, root=tmp_path / "none")
    assert f"no {Path(file).name}" in line(load, root=tmp_path)
    path = write(tmp_path / file, [{"other": "x"}] * 9)
    assert "has no column" in line(load, root=tmp_path) and "but other" in line(load, root=tmp_path)
    column = {"text": "text", "commonsense": "instruction", "gsm8k": "query"}[name]
    write(path, [{column: 3}] * 9)
    assert f"column {column!r} is int, not text" in line(load, root=tmp_path)
    path.write_bytes(path.read_bytes()[:20])
    assert "cannot read" in line(load, root=tmp_path)


def test_the_hub_gives_what_a_folder_gives(tmp_path, byte_tokenizer, monkeypatch):
    write(tmp_path / "data" / "train-00000-of-00001.parquet", rows(40))
    asked = []
    monkeypatch.setattr(hub, "download", lambda *args: asked.append(args) or tmp_path)
    module = loaded("commonsense", byte_tokenizer, task="commonsense_170k")
    assert len(module.train) == 32 and asked[0][:2] == ("zwhe99/commonsense_170k", "main")


@pytest.mark.parametrize("kwargs, word", [
    ({"task": "wik"}, "did you mean wiki"), ({"task": "wiki", "max_length": 2}, "max_length=2"),
    ({"task": "wiki", "batch_size": 0}, "batch_size=0"), ({"task": "wiki", "limit": 1.5}, "limit=1.5"),
])  # fmt: skip
def test_keys_that_will_not_do(kwargs, word):
    assert word in line(data.build, "text", **kwargs)


def test_windows_longer_than_the_text(toy_packages, byte_tokenizer):
    assert "is empty" in line(loaded, "text", byte_tokenizer, task="wiki", max_length=100_000)
    assert "no tokenizer" in line(loaded, "text", None, task="wiki")
