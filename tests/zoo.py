"""Tiny random models of every family, with a batch, a loss and calibration losses for each."""

import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import nn

from recombine import models

VISION, TEXT = ("tiny_vit", "tiny_swin"), ("tiny_deberta", "tiny_llama")
ARCHS = VISION + TEXT


def build(arch: str, seed: int = 0) -> nn.Module:
    """In eval mode; spectra uneven and biases not zero, as pretrained weights have them."""
    torch.manual_seed(seed)
    if arch in VISION:
        model = models.build(**{**OmegaConf.load(models.CONF / f"{arch}.yaml"), "num_classes": 5})
    else:
        model = {"tiny_deberta": deberta, "tiny_llama": llama}[arch]()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(torch.logspace(0, -1, p.shape[-1]) * 2) if p.ndim == 2 else p.add_(0.02 * torch.randn_like(p))
    return model.eval()


def deberta() -> nn.Module:
    from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

    config = DebertaV2Config(
        vocab_size=40,
        hidden_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=96,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        max_position_embeddings=16,
        type_vocab_size=0,
        relative_attention=True,
        position_buckets=4,
        pos_att_type=["p2c", "c2p"],
        share_att_key=True,
        norm_rel_ebd="layer_norm",
        initializer_range=0.15,
        num_labels=5,
    )
    return DebertaV2ForSequenceClassification(config)


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=40,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.15,
        tie_word_embeddings=True,
        max_position_embeddings=32,
    )
    return LlamaForCausalLM(config)


def batch(model: nn.Module, count: int = 6, seed: int = 1):
    """Images (count, 3, S, S), or token ids and attention mask (count, 7), some of them padding."""
    generator = torch.Generator().manual_seed(seed)
    if hasattr(model, "recombine_source"):
        size = model.recombine_source["image_size"]
        return torch.randn(count, 3, size, size, generator=generator)
    ids = torch.randint(1, 40, (count, 7), generator=generator)
    lengths = torch.randint(3, 8, (count, 1), generator=generator)
    return {"input_ids": ids, "attention_mask": (torch.arange(7) < lengths).long()}


def astray(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in float64, with everything that trains moved away from where it starts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.double().parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model


def outputs(model: nn.Module, x) -> torch.Tensor:
    """Logits; those at padding set to 0."""
    if isinstance(x, torch.Tensor):
        return model(x)
    logits = model(**x).logits
    return logits if logits.ndim == 2 else logits * x["attention_mask"][..., None]


def loss(model: nn.Module, x) -> torch.Tensor:
    """Cross-entropy on fixed labels, or of the next token."""
    logits = outputs(model, x)
    if logits.ndim == 2:
        return F.cross_entropy(logits, torch.arange(len(logits)) % 5)
    labels = x["input_ids"].masked_fill(x["attention_mask"] == 0, -100)[:, 1:]
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=-100)


def losses(model: nn.Module, batches: int = 4):
    """What a calibrating method is given."""
    return lambda: (loss(model, batch(model, seed=10 + i)) for i in range(batches))


def train(model: nn.Module, steps: int = 8, lr: float = 0.01) -> list[float]:
    x = batch(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr, weight_decay=0)
    history = []
    for _ in range(steps):
        value = loss(model, x)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        history.append(value.item())
    return history
