"""Llama models, their data and the harness: tiny models and files that the tests write; no network, no package."""

import recombine  # isort: skip  (its guard comes before transformers)

import copy
import gzip
import json
import socket
from pathlib import Path

import lightning as L
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
import yaml
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from safetensors.torch import load_file, save_file

from recombine import Budget, Svd, UsageError, data, models
from recombine.data import hub
from recombine.data.base import SPLITS
from recombine.data.language import choices, instructions, prompts, text
from recombine.evaluation import harness
from recombine.models import causal_lm, packaged
from recombine.runner import ranks
from recombine.training import objectives
from recombine.training.lit import LitRecombine

CONF = Path(__file__).parents[1] / "conf"


def config(name: str, **overrides) -> dict:
    return yaml.safe_load((CONF / "model" / f"{name}.yaml").read_text()) | overrides


def build(**overrides) -> torch.nn.Module:
    torch.manual_seed(0)
    return models.build(**config("tiny_llama", **overrides)).eval()


def line(function, *args, **kwargs) -> str:
    """The one line that this is refused with."""
    with pytest.raises(UsageError) as error:
        function(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture(scope="module")
def tokenizer():
    return causal_lm.byte_tokenizer()


@pytest.fixture
def offline(monkeypatch):
    """Any connection fails, at once."""

    def refuse(*_, **__):
        raise OSError("no network")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def packages(monkeypatch):
    """Articles, senses and questions in the place of the packages'."""
    named = {"test": "abcdefgh", "val": "ijklmnop", "train": "qrstuvwxyz"}
    made = {
        split: [
            {"title": 3 * c, "extract": f"{c}{c} is a letter. " * 9, "description": f"{c} {i}", "topic": "Letters"}
            for i, c in enumerate(letters)
        ]
        for split, letters in named.items()
    }
    made["test"] += [
        {"title": town, "extract": town, "description": f"Capital and largest city of {land}", "topic": "Uncategorized"}
        for town, land in (("Aa", "Oz"), ("Bb, Uz", "the Uz"), ("Cc", "Iz"), ("Dd", "Ez"))
    ]
    made["train"] += [
        {"title": land, "extract": land, "description": "Island country in a sea", "topic": "Uncategorized"}
        for land in ("Oz", "Uz", "Iz", "Ez")
    ]
    words = [(f"{3 + i % 2:02}", [f"n{chr(97 + i // 26)}{chr(97 + i % 26)}"], f"thing {i}", []) for i in range(60)]
    monkeypatch.setattr(choices, "articles", lambda: made)
    monkeypatch.setattr(choices, "senses", lambda: [("00", ["adjective"], "no noun", []), *words])
    monkeypatch.setattr(text, "PORTION", 3)
    monkeypatch.setattr(choices, "WORDS", {"test": 8, "val": 4, "train": 10})
    monkeypatch.setattr(instructions, "gsm8k", lambda: [{"question": "1 + 1?", "answer": "two\n#### 1,002"}] * 3)
    for cached in (choices.items, choices.nouns):
        cached.cache_clear()
    yield
    for cached in (choices.items, choices.nouns):
        cached.cache_clear()


# --- models


def test_a_random_llama_and_its_tokenizer(model, tokenizer):
    assert models.list_models().count("tiny_llama") == 1 and recombine.models.roles.head(model) is None
    text = "Grüße, 世界!\n  two  spaces"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert models.tokenizer(model.recombine_source).get_vocab() == tokenizer.get_vocab()
    again = models.build(**model.recombine_source)
    assert json.loads(json.dumps(again.recombine_source)) == model.recombine_source and len(tokenizer) == 259


@pytest.mark.parametrize("name, count", [("llama32_1b", 1_235_814_400), ("llama2_7b", 6_738_415_616)])
def test_the_gated_models_have_the_published_sizes(name, count):
    outside = {"name", "library", "arch", "id", "revision", "pretrained", "checkpoint", "dtype"}
    sizes = {k: v for k, v in config(name).items() if k not in outside | {"gradient_checkpointing"}}
    with torch.device("meta"):
        made = causal_lm.LlamaForCausalLM(causal_lm.configuration(name, sizes))
    assert sum(p.numel() for p in made.parameters()) == count


def test_bfloat16_and_gradient_checkpointing():
    assert build(dtype="bfloat16").model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    x, grads = torch.arange(24).view(2, 12), []
    for checkpointing in (False, True):
        made = build(gradient_checkpointing=checkpointing).train()
        assert made.model.layers[0].gradient_checkpointing is checkpointing
        made.requires_grad_(False).model.layers[1].mlp.requires_grad_(True)  # frozen embeddings, as adapters have them
        made(input_ids=x, labels=x).loss.backward()
        grads.append(made.model.layers[1].mlp.up_proj.weight.grad)
        with torch.inference_mode():
            made.eval()(input_ids=x)
    torch.testing.assert_close(*grads)


def test_a_folder_that_transformers_saved(tmp_path, model, tokenizer):
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    settings = config("tiny_llama", checkpoint=str(tmp_path), pretrained=True)
    here, x = models.build(**settings).eval(), torch.arange(9)[None]
    torch.testing.assert_close(here(input_ids=x).logits, model(input_ids=x).logits)
    assert models.tokenizer(here.recombine_source)("ab")["input_ids"] == tokenizer("ab")["input_ids"]

    assert "hidden_size=48" in line(models.build, **settings | {"hidden_size": 32})
    assert "no such key" in line(models.build, **settings | {"widht": 32})
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({k: v for k, v in state.items() if k != name}, file, {"format": "pt"})
    assert f"lacks {name}" in line(models.build, **settings)
    save_file(state | {"model.extra": torch.ones(2)}, file, {"format": "pt"})
    assert "too much: model.extra" in line(models.build, **settings)
    save_file(state | {name: state[name] * float("nan")}, file, {"format": "pt"})
    assert f"{name} is not finite" in line(models.build, **settings)
    file.write_bytes(file.read_bytes()[:1000])
    assert "cannot be read" in line(models.build, **settings)
    (tmp_path / "tokenizer.json").write_text("{")
    assert "no tokenizer" in line(models.tokenizer, here.recombine_source)
    (tmp_path / "config.json").unlink()
    assert "holds no config.json" in line(models.build, **settings)


@pytest.mark.parametrize("change, word", [
    ({"dtype": "int8"}, "dtype=int8"), ({"num_key_value_heads": 3}, "multiple"), ({"hidden_size": "x"}, "tiny_llama"),
    ({"tag": "packaged", "pretrained": True}, "no package"),
])  # fmt: skip
def test_what_a_llama_cannot_be(change, word):
    assert word in line(build, **change)


@pytest.mark.parametrize("name", ["llama32_1b", "llama2_7b"])
def test_without_access_one_line_says_the_ways(name, offline, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    said = line(models.build, **config(name))
    assert all(way in said for way in (config(name)["id"], "hf auth login", "model.checkpoint=FOLDER", "smollm2_135m"))


def test_gguf_becomes_the_same_model(tmp_path, model):
    """Written as llama.cpp writes a Llama: rows of q and k are interleaved for its rotary embedding."""
    import gguf

    writer, c = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama"), model.config
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    writer.add_vocab_size(c.vocab_size)
    writer.add_tokenizer_model("gpt2")
    vocabulary = causal_lm.byte_tokenizer().get_vocab()
    writer.add_token_list([*sorted(vocabulary, key=vocabulary.get)[:-1], "ab"])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)

    def rows(w: np.ndarray, heads: int) -> np.ndarray:
        return w.reshape(heads, 2, -1, w.shape[1]).swapaxes(1, 2).reshape(w.shape)

    names = {"self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate"}
    names |= {"mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm"}
    names |= {"post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k"}
    state = {k: v.numpy() for k, v in model.state_dict().items()}
    writer.add_tensor("token_embd.weight", state["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", state["model.norm.weight"])
    for i in range(c.num_hidden_layers):
        for ours, theirs in names.items():
            value = state[f"model.layers.{i}.{ours}.weight"]
            heads = {"attn_q": c.num_attention_heads, "attn_k": c.num_key_value_heads}.get(theirs)
            writer.add_tensor(f"blk.{i}.{theirs}.weight", value if heads is None else rows(value, heads))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    content, path = (tmp_path / "tiny.gguf").read_bytes(), tmp_path / "weights" / "tiny"
    packaged.llama_from_gguf(content, path)
    packaged.llama_from_gguf(content, path)  # another process was first
    assert [p.name for p in path.parent.iterdir()] == ["tiny"]
    settings = config("tiny_llama", checkpoint=str(path), pretrained=True)
    here, x = models.build(**settings).eval(), torch.arange(3, 60)[None]
    torch.testing.assert_close(here(input_ids=x).logits, model(input_ids=x).logits)
    assert models.tokenizer(here.recombine_source)("abc")["input_ids"] == [258, vocabulary["c"]]


# --- data


def loaded(name: str, tokenizer, **kwargs):
    module = data.build(name, **kwargs)
    module.tokenizer = tokenizer
    module.prepare_data()
    module.setup()
    return module


def test_text_is_packed(packages, tokenizer):
    module = loaded("text", tokenizer, task="wiki", max_length=16)
    whole = "</s>".join(a["extract"] for a in choices.articles()["test"]) + "</s>"
    batch = module.test.__getitems__([0, 1, 2])
    assert (
        tokenizer.decode(batch["input_ids"].flatten()) == whole[: len(tokenizer.decode(batch["input_ids"].flatten()))]
    )
    assert batch["input_ids"].shape == (3, 16) and torch.equal(batch["labels"], batch["input_ids"])
    assert module.info["sizes"]["train"] == len(module.train) and json.dumps(module.info)
    few = loaded("text", tokenizer, task="wiki", max_length=16, limit=2)
    assert torch.equal(few.train.ids, module.train.ids[:2])
    order = [batch["input_ids"] for batch in module.train_dataloader()]
    again = [batch["input_ids"] for batch in module.train_dataloader()]
    assert all(map(torch.equal, order, again)) and not torch.equal(torch.cat(order), module.train.ids)


def test_the_prompt_is_masked(tokenizer):
    rows = [("ask: ", "yes"), ("a longer question: ", "no")]
    batch = instructions.Instructions(rows, tokenizer, 64, loss_on_prompt=False).__getitems__([0, 1])
    learnt = [tokenizer.decode(labels[labels != -100]) for labels in batch["labels"]]
    assert learnt == ["yes</s>", "no</s>"]
    assert batch["attention_mask"].sum(1).tolist() == [len("ask: yes") + 1, len("a longer question: no") + 1]
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    batch = instructions.Instructions(rows, tokenizer, 64, loss_on_prompt=True).__getitems__([0])
    assert torch.equal(batch["labels"], batch["input_ids"])


def test_what_is_too_long_keeps_something_to_learn(tokenizer):
    row = [("ask: ", "yes"), ("x" * 50 + ": ", "yes"), ("ask: ", "y" * 50)]
    cut = instructions.Instructions(row, tokenizer, 16, loss_on_prompt=False)
    for i, (prompt, response) in enumerate([("ask: ", "yes</s>"), ("x" * 10 + ": ", "yes</s>"), (" ", "y" * 15)]):
        batch = cut.__getitems__([i])
        labels = batch["labels"][0]
        assert tokenizer.decode(labels[labels != -100]) == response
        assert tokenizer.decode(batch["input_ids"][0]) == prompt + response
    whole = instructions.Instructions(row, tokenizer, 16, loss_on_prompt=True).__getitems__([1])
    assert tokenizer.decode(whole["labels"][0]) == "x" * 16


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


def test_choices(packages, tokenizer):
    module = loaded("choices", tokenizer, task="wiki_description")
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
    assert "unknown choices task 'capital_of'" in line(data.build, "choices", task="capital_of")


def rows(count: int) -> list[dict]:
    """As commonsense_170k has them."""
    return [
        {
            "instruction": f"Please answer the following question with true or false, question: {i}?",
            "input": "",
            "output": f"the correct answer is {str(i % 2 == 0).lower()}",
            "answer": str(i % 2 == 0).lower(),
        }
        for i in range(count)
    ]


def write(path: Path, found: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(found), path)
    else:
        path.write_text(json.dumps(found))
    return path


@pytest.mark.parametrize("file", ["commonsense_170k.json", "data/train-00000-of-00001.parquet"])
def test_commonsense_from_a_folder(tmp_path, tokenizer, file):
    write(tmp_path / file, rows(40))
    module = loaded("commonsense", tokenizer, task="commonsense_170k", root=tmp_path, loss_on_prompt=True)
    assert [len(getattr(module, split)) for split in SPLITS] == [32, 4, 4]
    assert module.harness == harness.COMMONSENSE and len(module.harness) == 8
    prompt, response = module.train.rows[0]
    assert "### Instruction" in prompt and response.strip().startswith("the correct answer is")
    everything = {row for split in SPLITS for row in getattr(module, split).rows}
    assert len(everything) == 40
    for name in module.sets:
        write(tmp_path / name / "test.json", rows(2))
    assert module.harness == tuple(harness.FILES)


def test_metamath_and_gsm8k(tmp_path, tokenizer, packages):
    found = [
        {"type": "GSM_AnsAug", "query": f"{i}?", "original_question": f"{i}?", "response": f"The answer is: {i}"}
        for i in range(30)
    ]
    write(tmp_path / "MetaMathQA-395K.json", found)
    module = loaded("gsm8k", tokenizer, task="metamath", root=tmp_path)
    assert [len(getattr(module, split)) for split in SPLITS] == [24, 3, 3]
    assert module.test.rows[0][0] == prompts.metamath("1 + 1?") and module.harness == ("gsm8k_metamath",)


def test_wikitext(tmp_path, tokenizer):
    for split in ("train", "validation", "test"):
        cells = [{"text": ""}, {"text": f" = {split} = \n"}, {"text": "A sentence . \n" * 9}]
        write(tmp_path / "wikitext-2-raw-v1" / f"{split}-00000-of-00001.parquet", cells)
    module = loaded("text", tokenizer, task="wikitext2", root=tmp_path, max_length=16)
    assert tokenizer.decode(module.val.ids[0]) == "\n\n = validation = \n"[:16]


def test_c4_is_a_stream(tmp_path, tokenizer, monkeypatch, offline):
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
    module = loaded("text", tokenizer, task="c4", root=tmp_path, max_length=50, limit=20)
    told = {split: tokenizer.decode(getattr(module, split).ids.flatten()) for split in ("train", "val", "test")}
    assert told["train"].startswith("train 0 ") and "</s>train 8 " in told["train"] and len(module.train) == 20
    assert told["test"].startswith("validation 0 ") and "</s>validation 2 " in told["test"]
    assert told["val"].startswith("validation 1 ") and "validation 2 " not in told["val"]
    assert module.info["shared_train_test"] == 0 and "allenai/c4@1588ec45" in module.info["note"]
    assert "cannot read" in line(loaded, "text", tokenizer, task="c4", root=tmp_path, max_length=50, limit=10**6)
    assert "data.limit=null" in line(data.build, "text", task="c4")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    assert "allenai/c4 is not cached" in line(loaded, "text", tokenizer, task="c4", limit=1)
    (tmp_path / files["train"]).write_bytes(gzip.compress(b'{"txt": "x"}\n'))
    assert "row 0 has no column 'text'" in line(loaded, "text", tokenizer, task="c4", root=tmp_path, limit=1)
    (tmp_path / files["train"]).unlink()
    assert "c4-train.00000-of-01024.json.gz: put it there" in line(
        loaded, "text", tokenizer, task="c4", root=tmp_path, limit=1
    )


def test_packing_takes_no_more_documents_than_it_needs(tokenizer, monkeypatch):
    monkeypatch.setattr(text, "PORTION", 2)
    taken = []
    endless = (taken.append(i) or "seven b" for i in iter(int, 1))
    assert text.pack(tokenizer, endless, 16, 4).shape == (4, 16) and len(taken) == 8  # 8 tokens each
    assert text.pack(tokenizer, ["seven b"] * 5, 16, None).shape == (2, 16)
    assert text.pack(tokenizer, ["seven b"], 16, 4).shape == (0, 16)


def test_rows_of_train_that_are_in_test_are_said(tmp_path, tokenizer, packages, capsys):
    asked = [{"query": f"{i} + 1?", "response": "so"} for i in range(40)]  # the test asks 1 + 1?
    write(tmp_path / "MetaMathQA-395K.json", asked)
    module = loaded("gsm8k", tokenizer, task="metamath", root=tmp_path)
    at = [prompt for prompt, _ in module.train.rows].index(prompts.metamath("1 + 1?"))
    assert module.info["shared_train_test"] == 1 and module.info["first_shared"] == (at, 0)
    assert f"1 rows of train are in test too, the first is row {at} of train and 0 of test" in capsys.readouterr().err
    assert loaded("choices", tokenizer, task="wiki_description").info["shared_train_test"] == 0


@pytest.mark.parametrize("name, task, file", [
    ("text", "wikitext2", "wikitext-2-raw-v1/train-00000-of-00001.parquet"),
    ("commonsense", "commonsense_170k", "commonsense_170k.json"), ("gsm8k", "metamath", "MetaMathQA-395K.json"),
])  # fmt: skip
def test_files_that_will_not_do_are_refused_in_a_line(tmp_path, tokenizer, name, task, file, offline, monkeypatch):
    load = lambda **kwargs: loaded(name, tokenizer, task=task, **kwargs)  # noqa: E731
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


def test_the_hub_gives_what_a_folder_gives(tmp_path, tokenizer, monkeypatch):
    write(tmp_path / "data" / "train-00000-of-00001.parquet", rows(40))
    asked = []
    monkeypatch.setattr(hub, "download", lambda *args: asked.append(args) or tmp_path)
    module = loaded("commonsense", tokenizer, task="commonsense_170k")
    assert len(module.train) == 32 and asked[0][:2] == ("zwhe99/commonsense_170k", "main")


@pytest.mark.parametrize("kwargs, word", [
    ({"task": "wik"}, "did you mean 'wiki'"), ({"task": "wiki", "max_length": 2}, "max_length=2"),
    ({"task": "wiki", "batch_size": 0}, "batch_size=0"), ({"task": "wiki", "limit": 1.5}, "limit=1.5"),
])  # fmt: skip
def test_keys_that_will_not_do(kwargs, word):
    assert word in line(data.build, "text", **kwargs)


def test_windows_longer_than_the_text(packages, tokenizer):
    assert "is empty" in line(loaded, "text", tokenizer, task="wiki", max_length=100_000)
    assert "no tokenizer" in line(loaded, "text", None, task="wiki")


# --- scores


def test_perplexity(model, packages, tokenizer):
    samples = loaded("choices", tokenizer, task="wiki_description").test
    total = count = 0
    for i in range(len(samples)):  # one by one, so that nothing is padding
        one = samples.__getitems__([i])
        log = model(input_ids=one["input_ids"]).logits.double().log_softmax(-1)[0]
        for t in range(1, one["labels"].shape[1]):
            if (label := one["labels"][0, t]) != -100:
                total, count = total - log[t - 1, label].item(), count + 1
    assert harness.perplexity(model, samples, batch_size=3) == pytest.approx(np.exp(total / count), rel=1e-5)
    assert harness.perplexity(model.train(), samples, limit=1) > 1 and model.training and not model.eval().training


def test_the_task_of_the_stages_has_the_same_loss(model, packages, tokenizer):
    module = loaded("text", tokenizer, task="wiki", max_length=16, limit=3)
    loss, _ = objectives.build(module).loss(
        model, objectives.fetch(module, module.test, [0, 1, 2], torch.device("cpu"))
    )
    assert harness.perplexity(model, module.test) == pytest.approx(loss.exp().item(), rel=1e-5)


def test_a_splits_loss_is_the_mean_over_its_tokens(model, packages, tokenizer):
    """Through the trainer, in batches of other numbers of tokens, the last of them of fewer rows."""
    module = loaded("choices", tokenizer, task="wiki_description", batch_size=3)
    module.test.rows = [
        (prompt, response * (1 + 5 * (i % 4 == 0))) for i, (prompt, response) in enumerate(module.test.rows)
    ]
    sums, counts = [], []
    for i in range(len(module.test)):  # one by one, so that nothing is padding
        one = module.test.__getitems__([i])
        log, labels = model(input_ids=one["input_ids"]).logits.double().log_softmax(-1)[0, :-1], one["labels"][0, 1:]
        sums.append(F.nll_loss(log, labels, ignore_index=-100, reduction="sum").item())
        counts.append((labels != -100).sum().item())
    by_batch = [sum(counts[i : i + 3]) for i in range(0, len(counts), 3)]
    exact, by_rows = (
        sum(sums) / sum(counts),
        np.average(
            [sum(sums[i : i + 3]) / n for i, n in zip(range(0, len(sums), 3), by_batch, strict=True)],
            weights=[min(3, len(sums) - i) for i in range(0, len(sums), 3)],
        ),
    )
    assert len(set(by_batch)) > 1 and len(counts) % 3 and abs(exact - by_rows) > 1e-3 * exact
    lit = LitRecombine(copy.deepcopy(model), Svd(), objectives.build(module))
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    trainer = L.Trainer(accelerator="cpu", devices=1, **quiet)
    (found,) = trainer.test(lit, module.test_dataloader(), verbose=False)
    assert found["test/loss"] == pytest.approx(exact, rel=1e-6)
    (found,) = trainer.validate(lit, module.test_dataloader(), verbose=False)
    assert found["val/loss"] == pytest.approx(exact, rel=1e-6)
    assert lit.objective.report({"loss": exact})["ppl"] == pytest.approx(
        harness.perplexity(model, module.test), rel=1e-5
    )
    nothing = {k: v[:, :2] for k, v in module.test.__getitems__([0]).items()}  # a batch without a token that counts
    loss, _ = lit.objective.loss(model, nothing)
    assert loss == 0 and lit.objective.weight(nothing) == 0


def test_likelihoods_are_the_models(model, packages, tokenizer, offline):
    """Against log-likelihoods summed here; nothing connects."""
    found = harness.evaluate(model, tokenizer, choices.TASKS, batch_size=3)
    for task in choices.TASKS:
        right = {"acc": 0, "acc_norm": 0}
        questions = choices.items(task, "test")
        for item in questions:
            prompt = prompts.CHOICES[task].format(item["question"])
            sums = []
            for option in item["options"]:
                ids = torch.tensor(tokenizer(f"{prompt} {option}")["input_ids"])
                log = model(input_ids=ids[None]).logits[0].log_softmax(-1)
                begin = len(tokenizer(prompt)["input_ids"])
                sums.append(log[begin - 1 : -1].gather(1, ids[begin:, None]).sum().item())
            lengths = [len(option) for option in item["options"]]
            right["acc"] += int(np.argmax(sums) == item["answer"])
            right["acc_norm"] += int(np.argmax(np.array(sums) / lengths) == item["answer"])
        for metric, count in right.items():
            assert found[f"{task}/{metric}"] == pytest.approx(count / len(questions)), (task, metric)
            assert f"{task}/{metric}_stderr" in found
    assert harness.evaluate(model, tokenizer, ["capital_of"], limit=2).keys() < found.keys()


def test_a_recombined_model_is_scored_in_memory(model, packages, tokenizer):
    exact = copy.deepcopy(model)
    recombine.apply(exact, Svd(energy=1.0))
    before, after = (harness.evaluate(m, tokenizer, ["wordnet_definition"]) for m in (model, exact.train()))
    assert before == after and exact.training
    recombine.apply(small := copy.deepcopy(model), Svd(), Budget.parse("retained_40"))
    samples = loaded("text", tokenizer, task="wiki", max_length=16).test
    assert harness.perplexity(small, samples) != pytest.approx(harness.perplexity(model, samples), rel=1e-4)


def test_answers_are_generated_and_read(model, packages, tokenizer, tmp_path, offline):
    for name in harness.FILES.values():
        write(tmp_path / name / "test.json", rows(3))
    tried = ["gsm8k_metamath", "commonsense_boolq"]
    recombine.apply(small := copy.deepcopy(model), Svd(), Budget.parse("retained_40"))
    scores = harness.evaluate(small, tokenizer, tried, limit=1, root=tmp_path)
    assert scores["gsm8k_metamath/exact_match"] == 0.0 == scores["commonsense_boolq/exact_match"]
    said = {
        "gsm8k_metamath": ["So 2. The answer is: $1,002.", "The answer is: 3. The answer is: 1002", "1002"],
        "commonsense_boolq": [" the correct answer is true", "false", "it is false, not true"],
    }
    right = {"gsm8k_metamath": [1, 1, 0], "commonsense_boolq": [1, 1, 0]}
    for name, task in harness.load(tried, tmp_path)["tasks"].items():
        task.build_all_requests(limit=None, rank=0, world_size=1)
        for instance, answer in zip(task.instances, said[name], strict=True):
            instance.resps = [answer]
        task.apply_filters()
        marks = [task.process_results(i.doc, [i.filtered_resps["none"]])["exact_match"] for i in task.instances]
        assert marks == right[name], name
    assert "test.json" in line(harness.load, ["commonsense_piqa"], tmp_path / "none")


# --- the stages


def execute(folder: Path, *overrides: str) -> dict:
    said = ["model=tiny_llama", "trainer=cpu", "trainer.progress=false", "trainer.epochs=1", "harness.limit=2"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        ranks.main(compose("config", [*said, *overrides]), folder)
    return json.loads((folder / "result.json").read_text())


def test_the_original_model_is_scored(packages, tokenizer, tmp_path, offline):
    """Perplexity and the harness, before anything is trained; and what a rewriting alone does to both."""
    common = ["data=text", "data.max_length=16", "data.limit=9", "data.batch_size=4"]
    told = execute(tmp_path / "a", *common, "stage=evaluate", "harness.tasks=[capital_of]")
    assert told["method"] is None and told["account"]["trained"] == 0 and "capital_of/acc" in told["test"]
    torch.manual_seed(0)  # the run's seed draws the model
    model = models.build(**told["model"]).eval()
    module = loaded("text", tokenizer, task="wiki", max_length=16, limit=9)
    assert told["test"]["ppl"] == pytest.approx(harness.perplexity(model, module.test), rel=1e-5)
    same = execute(tmp_path / "b", *common, "stage=retrofit", "stage.test=true", "method=svd", "method.ratio=1.0")
    assert same["test"]["ppl"] != told["test"]["ppl"] and same["test"].keys() == {"loss", "ppl"}
    assert execute(tmp_path / "c", *common, "stage=retrofit", "method=svd", "method.ratio=0.5")["test"] == {}


def test_one_data_set_calibrates_and_another_trains(packages, tmp_path, monkeypatch):
    common = ["data=choices", "data.limit=8", "calibration.samples=6", "calibration.batch_size=3", "method=svd_llm"]
    common += ["method.ratio=0.5", "stage=retrofit"]
    inside = ["calibration.data.max_length=16", "calibration.data.limit=12"]
    own = execute(tmp_path / "own", *common)
    other = execute(tmp_path / "other", *common, "data@calibration.data=text", *inside)
    assert own["calibration"] is None and own["data"] == other["data"]
    assert other["calibration"]["name"] == "text" and other["calibration"]["sizes"]["train"] == 12
    assert own["weight_error"] != other["weight_error"]
    alone = execute(tmp_path / "alone", *common, "data=text", "data.max_length=16", "data.limit=12")
    assert alone["weight_error"] == other["weight_error"]  # as if the run's own data were the other's
    added = execute(tmp_path / "named", *common, "calibration.data.name=text", *("+" + part for part in inside))
    word = execute(tmp_path / "word", *common, "calibration.data=text")
    assert added["calibration"] == other["calibration"] and word["calibration"]["max_length"] == 256

    seen, step = [], LitRecombine.training_step
    monkeypatch.setattr(
        LitRecombine, "training_step", lambda lit, batch, i: (seen.append(batch), step(lit, batch, i))[1]
    )
    pair = ["data=choices", "data.limit=8", "method@compressor=svd_llm", "compressor.ratio=0.5", "method=lora"]
    trained = execute(tmp_path / "adapt", *pair, "calibration.data.name=text", "harness.tasks=[capital_of]")
    assert trained["calibration"]["name"] == "text" and trained["data"]["name"] == "choices"
    assert (seen[0]["labels"] == -100).any()  # prompts, which text has not
    assert "data=text is no task for model tiny_bert: take model=smollm2_135m" in line(
        execute, tmp_path / "w", "model=tiny_bert", "data=text", "data.limit=8"
    )
    for stage in ("adapt", "evaluate"):
        assert "data=sentences is no task for model tiny_llama: take model=minilm" in line(
            execute, tmp_path / "v", "data=sentences", f"stage={stage}"
        )
    assert "says nothing of data=choices" in line(execute, tmp_path / "x", *common, "calibration.data=offline")
    assert "unknown data 'txt': did you mean 'text'?" in line(execute, tmp_path / "y", *common, "calibration.data=txt")


def test_tasks_that_cannot_be_had(model, tokenizer, offline, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path))
    for place in ("huggingface_hub.constants", "datasets.config"):
        monkeypatch.setattr(f"{place}.HF_HUB_OFFLINE", True)  # else the client tries again for half a minute
    said = line(harness.evaluate, model, tokenizer, ["piqa"])
    assert all(way in said for way in ("connect once", "HF_HOME", "wiki_description"))
    assert "did you mean 'capital_of'" in line(harness.evaluate, model, tokenizer, ["capital"])


def test_lm_eval_knows_the_papers_sets():
    assert set(harness.COMMONSENSE) <= set(harness.index(True).all_tasks)


def test_the_trainer_of_many_gpus_wraps_a_llamas_blocks():
    """Composed and built; sharded training needs GPUs."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        strategy = instantiate(compose("config", ["trainer=fsdp"]).trainer.strategy)
    policy = strategy.kwargs["auto_wrap_policy"]
    assert policy(build().model.layers[0], False, 0) and not policy(torch.nn.Linear(2, 2), False, 0)


# --- the packaged model


@pytest.mark.full
def test_smollm2_and_its_data():
    model = models.build(**config("smollm2_135m")).eval()
    tokenizer = models.tokenizer(model.recombine_source)
    with torch.no_grad():
        word = model(**tokenizer("The capital of France is", return_tensors="pt")).logits[0, -1].argmax()
    assert tokenizer.decode(word) == " Paris" and sum(p.numel() for p in model.parameters()) == 134_515_008
    assert 12 < harness.perplexity(model, loaded("text", tokenizer, task="wiki").test, limit=8) < 20
    scores = harness.evaluate(model, tokenizer, choices.TASKS, limit=50)
    for task in choices.TASKS:
        assert scores[f"{task}/acc_norm"] > 0.35, task
    assert [len(choices.items("wiki_description", split)) for split in SPLITS] == [5011, 343, 1309]
    assert [len(choices.items("wordnet_definition", split)) for split in SPLITS] == [8000, 500, 2000]
    assert len(choices.items("capital_of", "test")) == 109 and len(instructions.gsm8k()) == 1319
    ids = torch.tensor(tokenizer(choices.articles()["test"][0]["extract"])["input_ids"])[None]
    assert F.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:]).item() < 4
