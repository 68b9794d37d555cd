"""What the hub of the tests serves: the repositories that the project reads, tiny, in their own files and columns."""

import io
import json
import tempfile
import zipfile
from pathlib import Path

import timm
import torch
import transformers
from datasets import Dataset
from safetensors.torch import save

from helpers import config
from helpers.hub_pictures import encoded, store
from helpers.hub_server import Hub
from helpers.llamas import rows
from helpers.texts import DEBERTA, spm, write_hub
from recombine.data.language import instructions, text
from recombine.data.text import glue
from recombine.data.vision import vtab
from recombine.data.vision.suite_base import Row
from recombine.models import causal_lm

LLAMA = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             vocab_size=259, max_position_embeddings=4096)  # fmt: skip
SIZES = {  # what the tiny weights need on the command line
    "deberta": [f"model.{key}={value}" for key, value in DEBERTA.items()],
    "llama32_1b": [f"model.{key}={value}" for key, value in LLAMA.items()] + ["model.dtype=float32"],
    "llama2_7b": [f"model.{key}={value}" for key, value in (LLAMA | {"num_key_value_heads": 4}).items()]
    + ["model.dtype=float32"],
}


def add_vit(hub: Hub, name: str) -> str:
    """Random weights in timm's layout, for example of "vit_tiny_patch16_224.augreg_in21k"."""
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False)
    told = {"architecture": name.partition(".")[0], "num_classes": model.num_classes}
    files = {"config.json": json.dumps(told).encode(), "model.safetensors": save(model.state_dict())}
    return hub.add("models", f"timm/{name}", files | {"pytorch_model.bin": b"not this one"})


def add_deberta(hub: Hub) -> str:
    """As microsoft/deberta-v3-base: float16 .bin with the pretraining's heads, spm.model, other frameworks' files."""
    keys = config("deberta_v3_base")
    sizes = DEBERTA | {key: keys[key] for key in ("relative_attention", "norm_rel_ebd", "share_att_key")}
    sizes |= {"pos_att_type": "p2c|c2p", "position_biased_input": False, "layer_norm_eps": 1e-7}
    torch.manual_seed(1)
    backbone = transformers.DebertaV2Model(transformers.DebertaV2Config(**sizes)).state_dict()
    state = {f"deberta.{name}": tensor.half() for name, tensor in backbone.items()}
    torch.save(state | {"lm_predictions.lm_head.bias": torch.zeros(70).half()}, content := io.BytesIO())
    told = sizes | {"model_type": "deberta-v2", "type_vocab_size": 0}
    files = {
        "config.json": json.dumps(told).encode(), "pytorch_model.bin": content.getvalue(), "spm.model": spm(),
        "tokenizer_config.json": b'{"do_lower_case": false, "vocab_type": "spm"}', "tf_model.h5": b"keras",
        "generator_config.json": b"{}", "pytorch_model.generator.bin": b"another",
    }  # fmt: skip
    return hub.add("models", keys["id"], files, commit=keys["revision"])


def add_llama(hub: Hub, name: str) -> str:
    """A tiny Llama over bytes in the files of Meta's gated repositories: shards with an index, and original/."""
    keys = config(name)
    kept = {k: keys[k] for k in ("tie_word_embeddings", "rms_norm_eps", "rope_parameters") if keys.get(k) is not None}
    sizes = LLAMA | kept | ({"num_key_value_heads": 4} if name == "llama2_7b" else {})
    torch.manual_seed(2)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, max_shard_size="100KB" if name == "llama2_7b" else "5GB")
        causal_lm.byte_tokenizer().save_pretrained(folder)
        files = {p.name: p.read_bytes() for p in Path(folder).iterdir()}
    files |= {"original/params.json": b"{}", "original/consolidated.00.pth": b"the same", "LICENSE.txt": b"terms"}
    return hub.add("models", keys["id"], files, commit=keys["revision"], gated=True)


def add_vtab(hub: Hub, tasks=("cifar", "kitti"), sizes=(2, 1, 1), branch: str = "main") -> str:
    """The archive, as NOAH packs it: vtab-1k/<task>/ with the lists and images/."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for task in tasks:
            lines, shade = {}, 0
            for split, size in zip(("train800", "val200", "test"), sizes, strict=True):
                where = "images/test" if split == "test" else "images/train800val200"
                for i in range(size):
                    number = shade if split != "test" else i
                    archive.writestr(f"vtab-1k/{task}/{where}/{number:06}.jpg", encoded(shade, "JPEG", 32))
                    lines.setdefault(split, []).append(
                        f"{where}/{number:06}.jpg {shade % vtab.Vtab.rows[task].classes}"
                    )
                    shade += 1
            lines["train800val200"] = lines["train800"] + lines["val200"]
            for split, listed in lines.items():
                archive.writestr(f"vtab-1k/{task}/{split}.txt", "\n".join(listed) + "\n")
    return hub.add("datasets", vtab.REPOSITORY, {vtab.ARCHIVE: content.getvalue()}, branch=branch)


def add_pictures(hub: Hub, row: Row) -> str:
    """A row of a suite, at its commit or on its branch."""
    with tempfile.TemporaryDirectory() as folder:
        store(Path(folder), row)
        for path in Path(folder).rglob("00000-of-00001.parquet"):  # the hub's own conversion numbers its files so
            path.rename(path.with_name("0000.parquet"))
        pinned = {"commit": row.revision} if len(row.revision) == 40 else {"branch": row.revision}
        return hub.add("datasets", row.repository, Path(folder), **pinned)


def add_glue(hub: Hub, *tasks: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        for task in tasks:
            write_hub(Path(folder), task)
        return hub.add("datasets", glue.REPOSITORY, Path(folder), commit=glue.REVISION)


def add_commonsense(hub: Hub) -> str:
    return hub.add(
        "datasets", instructions.Commonsense.repository, {"data/train-00000-of-00001.parquet": parquet(rows(150))}
    )


def add_metamath(hub: Hub) -> str:
    asked = [{"type": "GSM_Rephrased", "query": f"{i} + 1?", "original_question": f"{i} + 1?", "response": f"{i + 1}"}
             for i in range(150)]  # fmt: skip
    name, at = instructions.Gsm8k.repository, instructions.Gsm8k.revision
    return hub.add("datasets", name, {"MetaMathQA-395K.json": json.dumps(asked).encode()}, commit=at)


def add_wikitext(hub: Hub) -> str:
    lines = [{"text": f" line {i} of an article about rivers .\n"} for i in range(400)]
    files = {f"{config}/{split}-00000-of-00001.parquet": parquet(lines)
             for config in ("wikitext-2-raw-v1", "wikitext-2-v1")
             for split in ("train", "validation", "test")}  # fmt: skip
    return hub.add("datasets", text.Text.repository, files, commit=text.Text.revision)


def add_openbookqa(hub: Hub) -> str:
    """allenai/openbookqa as lm-eval asks for it: configurations in the card's YAML, and their parquet files."""
    card = "---\nconfigs:\n" + "".join(
        f"- config_name: {name}\n  data_files:\n"
        + "".join(f"  - split: {split}\n    path: {name}/{split}-*\n" for split in ("train", "validation", "test"))
        for name in ("additional", "main")
    )
    asked = [
        {"id": str(i), "question_stem": f"{i} is", "answerKey": "AB"[i % 2],
         "choices": {"text": ["even", "odd", "red", "far"], "label": ["A", "B", "C", "D"]}}
        for i in range(6)
    ]  # fmt: skip
    files = {f"{name}/{split}-00000-of-00001.parquet": parquet(asked)
             for name in ("additional", "main") for split in ("train", "validation", "test")}  # fmt: skip
    return hub.add("datasets", "allenai/openbookqa", files | {"README.md": f"{card}---\n# OpenBookQA\n".encode()})


def parquet(found: list[dict]) -> bytes:
    """Rows as `datasets` writes them, with its schema."""
    Dataset.from_list(found).to_parquet(content := io.BytesIO())
    return content.getvalue()


def add_stable_diffusion(hub: Hub) -> str:
    """Stable Diffusion 2.1-base in its repository's layout, with other forms of the weights beside those that count."""
    from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel

    keys = config("sd21_base")
    torch.manual_seed(3)
    blocks = {"down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
              "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"]}  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, **blocks, block_out_channels=[16, 32], layers_per_block=1,
        cross_attention_dim=16, attention_head_dim=[1, 2], norm_num_groups=8, use_linear_projection=True,
    )  # fmt: skip
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[8, 8], norm_num_groups=4, latent_channels=4, sample_size=16,
    )  # fmt: skip
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    words = ["!", *letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    text = transformers.CLIPTextConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, bos_token_id=len(words) - 2, eos_token_id=len(words) - 1,
    )  # fmt: skip
    scheduler = PNDMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, skip_prk_steps=True)
    with tempfile.TemporaryDirectory() as folder:
        parts = {"unet": unet, "vae": vae, "text_encoder": transformers.CLIPTextModel(text), "scheduler": scheduler}
        for name, part in parts.items():
            part.save_pretrained(Path(folder) / name)
        files = {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}
    told = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 16, "pad_token": "<|endoftext|>"}
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "!"}  # which counts
    noise = json.loads(files["scheduler/scheduler_config.json"])
    noise |= {"steps_offset": 1, "clip_sample": False, "set_alpha_to_one": False}
    files |= {
        "model_index.json": json.dumps({"_class_name": "StableDiffusionPipeline"}).encode(),
        "tokenizer/vocab.json": json.dumps({word: i for i, word in enumerate(words)}).encode(),
        "tokenizer/special_tokens_map.json": json.dumps(special).encode(),
        "scheduler/scheduler_config.json": json.dumps(noise).encode(),
        "tokenizer/merges.txt": b"#version: 0.2\n", "tokenizer/tokenizer_config.json": json.dumps(told).encode(),
        "unet/diffusion_pytorch_model.bin": b"the same", "unet/diffusion_pytorch_model.fp16.safetensors": b"half",
        "unet/diffusion_pytorch_model.non_ema.safetensors": b"another", "v2-1_512-ema-pruned.ckpt": b"one file",
    }  # fmt: skip
    return hub.add("models", keys["id"], files, commit=keys["revision"])
