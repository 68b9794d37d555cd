"""The models of scripts/model_matrix.py: architectures of timm, torchvision and transformers, tiny and random.

Each is one row: a name, how it is built, what it is called with, and the targets where it has not all roles.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module

import torch
from torch import Tensor, nn

CLASSES = 5


@dataclass(frozen=True)
class Tiny:
    """A tiny random model.

    build: makes it, without weights from anywhere.
    inputs: of a batch of two, as the model takes them.
    targets: of every method; None: each method's own.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], Tensor | dict[str, Tensor]]
    targets: tuple[str, ...] | None = None

    def fresh(self, seed: int = 0) -> nn.Module:
        """The model in eval mode; spectra are uneven and biases not zero, as pretrained weights have them."""
        torch.manual_seed(seed)
        model = self.build().eval()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.05 * torch.randn_like(p))  # also heads that start at 0
                if p.ndim == 2:
                    p.mul_(torch.logspace(0, -1, p.shape[-1]))
        return model


def _pictures(size: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(2, 3, size, size)


def _timm(arch: str, size: int = 16, targets: tuple[str, ...] | None = None, **sizes) -> Tiny:
    def build() -> nn.Module:
        return import_module("timm").create_model(arch, num_classes=CLASSES, **sizes)

    return Tiny(build, _pictures(size), targets)


_VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
_STAGES = {"img_size": 16, "patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2]}
_MLP_ONLY = ("up", "down")


def _maxvit() -> nn.Module:
    maxxvit = import_module("timm.models.maxxvit")
    sizes = maxxvit.MaxxVitCfg(
        embed_dim=(16,), depths=(1,), block_type=("M",), stem_width=8, **maxxvit._rw_max_cfg(window_size=4, dim_head=8)
    )
    return maxxvit.MaxxVit(sizes, img_size=16, num_classes=CLASSES)


def _mixer(block: str = "MixerBlock") -> nn.Module:
    mlp_mixer = import_module("timm.models.mlp_mixer")
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "num_blocks": 2, "num_classes": CLASSES}
    sizes |= {"mlp_ratio": 4, "norm_layer": mlp_mixer.Affine} if block == "ResBlock" else {}
    return mlp_mixer.MlpMixer(block_layer=getattr(mlp_mixer, block), **sizes)


def _mobilevit() -> nn.Module:
    byobnet, sizes = import_module("timm.models.byobnet"), import_module("timm.models.mobilevit").model_cfgs
    return byobnet.ByobNet(replace(config := sizes["mobilevit_xxs"], blocks=config.blocks[:3]), num_classes=CLASSES)


def _torchvision_vit() -> nn.Module:
    return import_module("torchvision.models").VisionTransformer(16, 8, 2, 2, 16, 32, num_classes=CLASSES)


def _torchvision_swin() -> nn.Module:
    swin = import_module("torchvision.models").SwinTransformer
    return swin([2, 2], 16, [1, 1], [2, 2], [2, 2], num_classes=CLASSES)


VISION = {
    "timm ViT": _timm("vit_tiny_patch16_224", **_VIT),
    "timm DeiT III": _timm("deit3_small_patch16_224", **_VIT),
    "timm DeiT distilled": _timm("deit_tiny_distilled_patch16_224", **_VIT),
    "timm SigLIP": _timm("vit_base_patch16_siglip_224", **_VIT),
    "timm DINOv2 with registers": _timm("vit_small_patch14_reg4_dinov2", **_VIT),
    "timm DINOv2 giant (SwiGLU)": _timm("vit_giant_patch14_dinov2", **_VIT, mlp_ratio=4),
    "timm DINOv3": _timm("vit_small_patch16_dinov3", **_VIT),
    "timm ViT, parallel branches": _timm("vit_small_patch16_18x2_224", **_VIT),
    "timm ViT, relative positions": _timm("vit_relpos_small_patch16_224", **_VIT),
    "timm SAM ViT": _timm("samvit_base_patch16_224", **_VIT),
    "timm NaFlexViT": _timm("naflexvit_base_patch16_gap", embed_dim=16, depth=2, num_heads=2, patch_size=8),
    "timm BEiT": _timm("beit_base_patch16_224", **_VIT),
    "timm BEiT v2": _timm("beitv2_base_patch16_224", **_VIT),
    "timm EVA-02": _timm("eva02_base_patch14_224", **_VIT, mlp_ratio=2),
    "timm EVA-02, fused qkv": _timm("eva02_tiny_patch14_224", **_VIT, mlp_ratio=2),
    "timm CaiT": _timm("cait_xxs24_224", **_VIT),
    "timm XCiT": _timm("xcit_nano_12_p16_224", **_VIT | {"patch_size": 16}, size=32),
    "timm Swin": _timm("swin_tiny_patch4_window7_224", **_STAGES),
    "timm Swin v2": _timm("swinv2_tiny_window8_256", **_STAGES),
    "timm Hiera": _timm("hiera_tiny_224", 64, img_size=(64, 64), embed_dim=8, num_heads=1, stages=(1, 1, 1, 1)),
    "timm MaxViT": Tiny(_maxvit, _pictures(16)),
    "timm MobileViT": Tiny(_mobilevit, _pictures(32)),
    "timm MLP-Mixer": Tiny(_mixer, _pictures(16), _MLP_ONLY),
    "timm ResMLP": Tiny(lambda: _mixer("ResBlock"), _pictures(16), _MLP_ONLY),
    "timm ConvNeXt": _timm("convnext_atto", 32, depths=(1, 1, 1, 1), dims=(8, 8, 8, 8)),
    "torchvision ViT": Tiny(_torchvision_vit, _pictures(16)),
    "torchvision ViT, MLPs": Tiny(_torchvision_vit, _pictures(16), _MLP_ONLY),
    "torchvision Swin": Tiny(_torchvision_swin, _pictures(16)),
    "torchvision Swin, MLPs": Tiny(_torchvision_swin, _pictures(16), _MLP_ONLY),
}


def _ids() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, 60, (2, 6))}


def _seen() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 16, 16)}


def _hf(name: str, config: str, inputs: Callable = _ids, targets: tuple[str, ...] | None = None, **sizes) -> Tiny:
    def build() -> nn.Module:
        transformers = import_module("transformers")
        made = getattr(transformers, config)(**sizes)
        made.num_labels = CLASSES
        if name == "DINOv3ViTModel":
            return import_module("transformers.models.dinov3_vit").DINOv3ViTModel(made)
        return getattr(transformers, name)(made)

    return Tiny(build, inputs, targets)


_SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_TEXT = _SIZES | _SPECIAL | {"vocab_size": 64}
_GROUPED = _TEXT | {"num_key_value_heads": 1, "head_dim": 8}
_EYES = _SIZES | {"image_size": 16, "patch_size": 8}
_HF_SWIN = {"image_size": 16, "patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2]}
_TWO = {"vision_config": _EYES, "text_config": _TEXT | {"max_position_embeddings": 8}}
_T5 = _SPECIAL | {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
_ENCODER = {"encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}
_DECODER = {"decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 32}
_WHISPER = _ENCODER | _DECODER | _SPECIAL | {"vocab_size": 64, "d_model": 16, "num_mel_bins": 8}
_EAR = {"conv_dim": [8, 8], "conv_kernel": [4, 4], "conv_stride": [4, 4], "num_feat_extract_layers": 2, "layerdrop": 0}
_EAR |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8}
_FALCON = _SPECIAL | {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_ATTENTION = ("q", "k", "v", "o")


def _both() -> dict[str, Tensor]:
    return _ids() | _seen()


def _translated() -> dict[str, Tensor]:
    return _ids() | {"decoder_input_ids": torch.randint(3, 60, (2, 4))}


def _heard() -> dict[str, Tensor]:
    return {"input_features": torch.randn(2, 8, 16), "decoder_input_ids": torch.randint(3, 60, (2, 4))}


def _wave() -> dict[str, Tensor]:
    return {"input_values": torch.randn(2, 256)}


def _wrapped() -> nn.Module:
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    sizes = {key: value for key, value in _VIT.items() if key != "patch_size"} | {"patch_size": 8}
    config = TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args=sizes, num_labels=CLASSES)
    return TimmWrapperForImageClassification(config)


TRANSFORMERS = {
    "BERT, classes": _hf("BertForSequenceClassification", "BertConfig", **_TEXT),
    "BERT, tokens": _hf("BertForTokenClassification", "BertConfig", **_TEXT),
    "BERT, masked words": _hf("BertForMaskedLM", "BertConfig", **_TEXT),
    "RoBERTa": _hf("RobertaForSequenceClassification", "RobertaConfig", **_TEXT),
    "ELECTRA": _hf("ElectraForSequenceClassification", "ElectraConfig", **_TEXT),
    "DeBERTa v2": _hf("DebertaV2ForSequenceClassification", "DebertaV2Config", **_TEXT),
    "DistilBERT": _hf(
        "DistilBertForSequenceClassification", "DistilBertConfig", vocab_size=64, dim=16, n_layers=2, n_heads=2,
        hidden_dim=32, pad_token_id=0,
    ),
    "ModernBERT": _hf(
        "ModernBertForSequenceClassification", "ModernBertConfig", **_TEXT, cls_token_id=1, sep_token_id=2
    ),
    "Llama": _hf("LlamaForCausalLM", "LlamaConfig", **_GROUPED),
    "Llama, classes": _hf("LlamaForSequenceClassification", "LlamaConfig", **_GROUPED),
    "Mistral": _hf("MistralForCausalLM", "MistralConfig", **_GROUPED),
    "Qwen2": _hf("Qwen2ForCausalLM", "Qwen2Config", **_GROUPED),
    "Qwen3": _hf("Qwen3ForCausalLM", "Qwen3Config", **_GROUPED),
    "Gemma": _hf("GemmaForCausalLM", "GemmaConfig", **_GROUPED),
    "Gemma 2": _hf("Gemma2ForCausalLM", "Gemma2Config", **_GROUPED),
    "Gemma 3": _hf("Gemma3ForCausalLM", "Gemma3TextConfig", **_GROUPED),
    "OLMo": _hf("OlmoForCausalLM", "OlmoConfig", **_GROUPED),
    "Granite": _hf("GraniteForCausalLM", "GraniteConfig", **_GROUPED),
    "Phi-3": _hf("Phi3ForCausalLM", "Phi3Config", **_GROUPED),
    "Mixtral": _hf("MixtralForCausalLM", "MixtralConfig", num_local_experts=2, **_GROUPED),
    "Mixtral, attention": _hf(
        "MixtralForCausalLM", "MixtralConfig", targets=_ATTENTION, num_local_experts=2, **_GROUPED
    ),
    "OPT": _hf(
        "OPTForCausalLM", "OPTConfig", **_TEXT, ffn_dim=32, word_embed_proj_dim=16, max_position_embeddings=16
    ),
    "GPT-2": _hf("GPT2LMHeadModel", "GPT2Config", **_SPECIAL, vocab_size=64, n_embd=16, n_layer=2, n_head=2),
    "GPT-NeoX": _hf("GPTNeoXForCausalLM", "GPTNeoXConfig", **_TEXT),
    "BLOOM": _hf("BloomForCausalLM", "BloomConfig", **_SPECIAL, vocab_size=64, hidden_size=16, n_layer=2, n_head=2),
    "Falcon, one key and value": _hf("FalconForCausalLM", "FalconConfig", **_FALCON),
    "Falcon, grouped": _hf(
        "FalconForCausalLM", "FalconConfig", **_FALCON, num_kv_heads=2, new_decoder_architecture=True
    ),
    "T5": _hf("T5ForConditionalGeneration", "T5Config", _translated, **_T5),
    "T5, gated": _hf("T5ForConditionalGeneration", "T5Config", _translated, **_T5, feed_forward_proj="gated-gelu"),
    "Whisper": _hf("WhisperForConditionalGeneration", "WhisperConfig", _heard, **_WHISPER, max_source_positions=8),
    "wav2vec 2.0": _hf("Wav2Vec2ForSequenceClassification", "Wav2Vec2Config", _wave, **_TEXT, **_EAR),
    "ViT": _hf("ViTForImageClassification", "ViTConfig", _seen, **_EYES),
    "DeiT": _hf("DeiTForImageClassification", "DeiTConfig", _seen, **_EYES),
    "DeiT with teacher": _hf("DeiTForImageClassificationWithTeacher", "DeiTConfig", _seen, **_EYES),
    "DINOv2": _hf("Dinov2ForImageClassification", "Dinov2Config", _seen, **_EYES),
    "DINOv3": _hf("DINOv3ViTModel", "DINOv3ViTConfig", _seen, **_EYES),
    "BEiT": _hf("BeitForImageClassification", "BeitConfig", _seen, **_EYES),
    "Swin": _hf("SwinForImageClassification", "SwinConfig", _seen, **_HF_SWIN),
    "Swin v2": _hf("Swinv2ForImageClassification", "Swinv2Config", _seen, **_HF_SWIN),
    "CLIP": _hf("CLIPModel", "CLIPConfig", _both, **_TWO, projection_dim=8),
    "CLIP, pictures": _hf("CLIPVisionModel", "CLIPVisionConfig", _seen, **_EYES),
    "CLIP, text": _hf("CLIPTextModel", "CLIPTextConfig", **_TEXT, max_position_embeddings=8),
    "SigLIP": _hf("SiglipModel", "SiglipConfig", _both, **_TWO),
    "SigLIP, pictures": _hf("SiglipVisionModel", "SiglipVisionConfig", _seen, **_EYES),
    "SigLIP, classes": _hf("SiglipForImageClassification", "SiglipConfig", _seen, **_TWO),
    "timm ViT in a TimmWrapper": Tiny(_wrapped, _seen),
    "ALBERT, inferred": _hf("AlbertForSequenceClassification", "AlbertConfig", **_TEXT, embedding_size=8),
    "MPNet, inferred": _hf("MPNetForSequenceClassification", "MPNetConfig", **_TEXT),
    "Phi, inferred": _hf("PhiForCausalLM", "PhiConfig", **_TEXT),
    "GPT-J, inferred": _hf(
        "GPTJForCausalLM", "GPTJConfig", **_SPECIAL, vocab_size=64, n_embd=16, n_layer=2, n_head=2, rotary_dim=4
    ),
}  # fmt: skip

MODELS = VISION | TRANSFORMERS
