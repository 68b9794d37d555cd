"""Text encoders of transformers with a classifier, behind the same `build` as timm's models.

minilm           all-MiniLM-L6-v2 (arXiv 2002.10957) out of a package: a sentence encoder, so tokens are averaged
deberta_v3_base  microsoft/deberta-v3-base (arXiv 2111.09543)
tiny_bert        random, over bytes

Weights, config.json and tokenizer lie in one folder: a local ``checkpoint``, the package (``tag: packaged``), or the
hub's ``id`` at its ``revision``. ``pretrained=False`` takes the sizes of the YAML and torch's current seed.

The tokenizer is transformers', which reads DeBERTa's spm.model with NFC for its NFKC: rare characters may differ.
Where the weights lack DeBERTa's pooler, it is drawn from a seed of its own: part of the backbone, the same in every
run. Paper (CERSA Tab. 8): 730.5 MiB for LoRA r=32, which leaves the pooler frozen. Here: the same; `full` trains it.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from omegaconf import ListConfig
from tokenizers import processors
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    BertForSequenceClassification,
    BertModel,
    BertPreTrainedModel,
    DebertaV2ForSequenceClassification,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from recombine.errors import UsageError, first_line
from recombine.models import roles
from recombine.models.allowed import config_values
from recombine.models.hf_folder import UNREADABLE, bytes_only, folder, read_tokenizer, refuse_damaged
from recombine.models.weights import silence
from recombine.runtime.kinds import Name, Place, Whole

log = logging.getLogger(__name__)


class MeanPooled(BertPreTrainedModel):
    """BERT whose classifier sees the mean over the tokens that are no padding, as sentence encoders are trained."""

    def __init__(self, config):
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        given = config.classifier_dropout
        self.dropout = nn.Dropout(config.hidden_dropout_prob if given is None else given)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> SequenceClassifierOutput:
        """Token ids (B, T) to logits (B, classes)."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask  # (B, T)
        tokens = self.bert(input_ids, attention_mask=mask, token_type_ids=token_type_ids).last_hidden_state
        keep = mask[..., None].to(tokens.dtype)
        pooled = (tokens * keep).sum(1) / keep.sum(1)  # (B, d)
        return SequenceClassifierOutput(logits=self.classifier(self.dropout(pooled)))


MODELS = {  # arch, pooling -> class; cls is the family's own pooler on the first token
    ("bert", "cls"): BertForSequenceClassification,
    ("bert", "mean"): MeanPooled,
    ("deberta-v2", "cls"): DebertaV2ForSequenceClassification,
}
DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout", "cls_dropout")
UNDECLARED = ("cls_dropout", "position_buckets", "norm_rel_ebd", "share_att_key")  # DeBERTa reads them all the same
OTHERS_HEADS = ("pooler.", "bert.pooler.", "cls.", "lm_predictions.", "mask_predictions.", "classifier.")
SPECIAL = ("[PAD]", "[CLS]", "[SEP]", "[MASK]")  # of the byte tokenizer, before the 256 bytes
WAYS = "connect once, or give model.checkpoint=FOLDER, or take model=minilm or model.pretrained=false"


def build(
    name: Name,
    *,
    arch: Name,
    pooling: Literal["cls", "mean"] = "cls",
    id: Name | None = None,
    revision: Name | None = None,
    tag: Name | None = None,
    pretrained: bool = True,
    checkpoint: Place | None = None,
    num_classes: Whole = 0,
    **config,
) -> nn.Module:
    """A transformers model for sequence classification; ``model.recombine_source`` says where it came from.

    Args:
        pooling: cls, or mean for a sentence encoder.
        num_classes: outputs of the classifier; 0: none, its input comes out.
        config: of the transformers configuration. Sizes say what the weights must have; dropouts hold in their stead.
    """
    if (cls := MODELS.get((arch, pooling))) is None:
        known = ", ".join(f"arch={a} pooling={p}" for a, p in MODELS)
        raise UsageError(f"model {name}: arch={arch} pooling={pooling} is not known: choose from {known}")
    config = {key: list(value) if isinstance(value, ListConfig) else value for key, value in config.items()}
    where = {"id": id, "revision": revision, "tag": tag, "pretrained": pretrained, "checkpoint": checkpoint}
    path = folder(name, WAYS, **where)
    config_values(cls.config_class, config, UNDECLARED)
    try:
        wanted = cls.config_class(**config)
        wanted.num_labels = num_classes or 1
        model = cls(wanted) if path is None else None
    except (StrictDataclassError, TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"model {name}: {cls.__name__} cannot be built ({reason}): correct that key") from error
    if path is not None:
        model, own = load(name, cls, path, wanted, config)
    model.own_classes, model.recombine_weights = 0 if path is None else own, path
    if not num_classes:
        reset_head(model, 0)
    model.recombine_source = {
        "name": name,
        "library": "transformers",
        "arch": arch,
        "pooling": pooling,
        **where,
        "checkpoint": None if checkpoint is None else str(checkpoint),
        "num_classes": num_classes,
        **config,
    }
    return model.train()  # as a new module is; transformers loads into eval mode


def load(name: str, cls: type, path: Path, wanted, config: dict) -> tuple[nn.Module, int]:
    """The folder's weights, and how many classes the folder's own classifier tells apart (0: it has none).

    Every tensor of the backbone has to be there. Only heads may be missing or too many.

    Raises:
        UsageError: the folder cannot be read, or is of another model.
    """
    try:
        found = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except UNREADABLE as error:
        reason = first_line(error)
        raise UsageError(f"model {name}: {path}/config.json cannot be read ({reason}); replace it") from error
    if found.model_type != wanted.model_type:
        arch = f"a {found.model_type}, not a {wanted.model_type}"
        raise UsageError(f"model {name}: {path} holds {arch}: set model= to the one that the weights are of")
    for key in DROPOUTS:
        if config.get(key) is not None:
            setattr(found, key, config[key])
    theirs = {key: getattr(found, key, None) for key in config if key not in DROPOUTS}
    if differ := [f"model.{k}={v}" for k, v in theirs.items() if v != getattr(wanted, k, None)]:
        raise UsageError(f"model {name}: {path} holds a model of other sizes; to take it, say {' '.join(differ)}")
    found.num_labels = wanted.num_labels
    try:
        with silence():
            model, told = cls.from_pretrained(
                path,
                config=found,
                dtype=torch.float32,
                local_files_only=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except UNREADABLE as error:
        reason = first_line(error)
        raise UsageError(f"model {name}: the weights in {path} cannot be read ({reason}); replace the file") from error
    backbone = f"{cls.base_model_prefix}."
    lacking = {key for key in told["missing_keys"] if key.startswith(backbone)}
    misfits = {key for key, *_ in told["mismatched_keys"] if not key.startswith("classifier.")}
    surplus = {key for key in told["unexpected_keys"] if not key.startswith(OTHERS_HEADS) and "position_ids" not in key}
    problems = ((lacking, "lacks"), (misfits, "has another shape of"), (surplus, "has too much:"))
    refuse_damaged(name, path, model, problems)
    if any(key.startswith("pooler.") for key in told["missing_keys"]):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            fresh(model, model.pooler.dense)
        log.info("%s gives no pooler: it is drawn, the same in every run", path)
    heads = {key: shape for key, shape, _ in told["mismatched_keys"] if key == "classifier.weight"}
    heads |= dict.fromkeys({"classifier.weight"} & set(told["missing_keys"]), (0,))
    return model, heads.get("classifier.weight", model.classifier.weight.shape)[0]


def reset_head(model: nn.Module, num_classes: int) -> None:
    """A fresh last layer of the classifier, as the family draws it; 0 classes: none."""
    layer = roles.output_layer(model)
    name = next((name for name, module in model.named_modules() if module is layer), "classifier")
    width, bias = (model.config.hidden_size, True) if layer is None else (layer.in_features, layer.bias is not None)
    old = next(model.parameters())
    model.set_submodule(name, nn.Linear(width, num_classes, bias).to(old) if num_classes else nn.Identity())
    if num_classes:
        fresh(model, model.get_submodule(name))
        model.num_labels = model.config.num_labels = num_classes


@torch.no_grad()
def fresh(model: nn.Module, linear: nn.Linear) -> None:
    """Draws a layer anew, as the family does: normal weights, biases of 0."""
    linear.weight.normal_(0.0, getattr(model.config, "initializer_range", 0.02))
    if linear.bias is not None:
        linear.bias.zero_()


def tokenizer(source: Mapping) -> PreTrainedTokenizerFast:
    """The tokenizer of a model by its ``recombine_source``; a random model reads bytes."""
    return read_tokenizer(source, WAYS) or byte_tokenizer(source.get("max_position_embeddings", 512))


def byte_tokenizer(longest: int) -> PreTrainedTokenizerFast:
    """Bytes are tokens 4 to 259, after [PAD], [CLS], [SEP] and [MASK]."""
    pad, begin, end, mask = SPECIAL
    tokenizer = bytes_only(SPECIAL)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A {end}", pair=f"{begin} $A {end} $B:1 {end}:1", special_tokens=[(begin, 1), (end, 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=longest,
        pad_token=pad,
        cls_token=begin,
        sep_token=end,
        mask_token=mask,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
