"""Llama models: random, from a folder and from GGUF."""

import recombine  # isort: skip  (its guard comes before transformers)

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import config
from helpers.llamas import build, line
from recombine import models
from recombine.models import causal_lm, packaged


def test_a_random_llama_and_its_tokenizer(tiny_llama, byte_tokenizer):
    assert models.list_models().count("tiny_llama") == 1 and recombine.models.roles.head(tiny_llama) is None
    text = "Grüße, 世界!\n  two  spaces"
    assert byte_tokenizer.decode(byte_tokenizer(text)["input_ids"]) == text
    assert models.tokenizer(tiny_llama.recombine_source).get_vocab() == byte_tokenizer.get_vocab()
    again = models.build(**tiny_llama.recombine_source)
    assert json.loads(json.dumps(again.recombine_source)) == tiny_llama.recombine_source and len(byte_tokenizer) == 259


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


def test_a_folder_that_transformers_saved(tmp_path, tiny_llama, byte_tokenizer):
    tiny_llama.save_pretrained(tmp_path)
    byte_tokenizer.save_pretrained(tmp_path)
    settings = config("tiny_llama", checkpoint=str(tmp_path), pretrained=True)
    here, x = models.build(**settings).eval(), torch.arange(9)[None]
    torch.testing.assert_close(here(input_ids=x).logits, tiny_llama(input_ids=x).logits)
    assert models.tokenizer(here.recombine_source)("ab")["input_ids"] == byte_tokenizer("ab")["input_ids"]

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
    ({"dtype": "int8"}, "dtype=int8"), ({"num_key_value_heads": 3}, "must divide num_attention_heads=4"),
    ({"hidden_size": "x"}, "model.hidden_size=x"), ({"tag": "packaged", "pretrained": True}, "no package"),
])  # fmt: skip
def test_what_a_llama_cannot_be(change, word):
    assert word in line(build, **change)


@pytest.mark.parametrize("name", ["llama32_1b", "llama2_7b"])
def test_without_access_one_line_says_the_ways(name, offline, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    said = line(models.build, **config(name))
    assert all(way in said for way in (config(name)["id"], "hf auth login", "model.checkpoint=FOLDER", "smollm2_135m"))


def test_gguf_becomes_the_same_model(tmp_path, tiny_llama):
    """Written as llama.cpp writes a Llama: rows of q and k are interleaved for its rotary embedding."""
    import gguf

    writer, c = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama"), tiny_llama.config
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
    state = {k: v.numpy() for k, v in tiny_llama.state_dict().items()}
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
    torch.testing.assert_close(here(input_ids=x).logits, tiny_llama(input_ids=x).logits)
    assert models.tokenizer(here.recombine_source)("abc")["input_ids"] == [258, vocabulary["c"]]
