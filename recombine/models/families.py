"""The families that are known by name: one row for each way in which libraries name the layers of a block.

Every row is tried on a tiny model by tests/models/test_matrix.py, which writes the table of docs/models.md.
"""

from recombine.models.family import Family

_HEADS = "classifier|score|classification_head|qa_outputs"
_NORM = r"(?:.*\.)?(?:\w*[nN]orm\w*|ln_\w+)"  # by name; left out where norms are of images or shift their weight by 1
_EMBED = r"(?:.*\.)?(?:patch_embeddings\.projection|patch_embedding|patch_embeddings)"


def _through_unet(name: str) -> int:
    """0 for what runs before a UNet, 1 on the way down, 2 in the middle, 3 on the way up."""
    parts = ("down_blocks", "mid_block", "up_blocks")
    return next((i for i, part in enumerate(parts, 1) if part in name.split(".")), 0)


def _row(classes: str, block: str, *, head: str = _HEADS, blocks: str = "", note: str = "", order=None, **roles: str):
    """A Family whose layers lie in blocks.

    Args:
        block: regex of the module whose children `roles` name.
        blocks: regex of the blocks, where it is not `block`.
        note, order: of the `Family`.
        roles: role -> regex of the name inside a block; norm and embed match the whole name.
    """
    whole = {
        role: pattern if role in ("norm", "embed", "reduction") else rf"{block}\.(?:{pattern})"
        for role, pattern in roles.items()
    }
    return Family(classes=classes, roles=whole, blocks=blocks or block, head=head, note=note, order=order)


def _timm(classes: str, block: str, *, blocks: str = "", **more: str) -> Family:
    """A model of timm: attn.qkv is one layer until it is split, or there are q, k and v."""
    norm = rf"(?:{block}|layers\.\d+\.downsample|patch_embed)\.norm[12]?|norm|fc_norm"
    roles = {
        "qkv": r"attn\.qkv",
        **{part: rf"attn\.(?:qkv\.{part}|{part}_proj|{part})" for part in "qkv"},
        "o": r"attn\.proj",
        "up": r"mlp\.fc1(?:_x)?",
        "down": r"mlp\.fc2",
        "gate": r"mlp\.fc1_g",
        "norm": norm,
        "embed": r"patch_embed\.proj",
    }
    roles = {role: pattern for role, pattern in (roles | more).items() if pattern}
    return _row(classes, block, head="head", blocks=blocks, **roles)


def _names(*roles: str) -> dict[str, str]:
    """q="self_attn.q_proj" and so on, for each line of "q k v: self_attn.{}_proj"."""
    found = {}
    for line in roles:
        names, _, pattern = line.partition(": ")
        found |= {name: pattern.replace("{}", name) for name in names.split()}
    return found


_VIT_BLOCK = r"(?:cls_attn_)?blocks(?:_token_only)?\.\d+"
_VIT = rf"{_VIT_BLOCK}(?:\.(?:attns|ffns)\.\d+)?"  # of two branches side by side
_SWIN = r"layers\.\d+\.blocks\.\d+"
_BERT, _LLAMA = r"(?:\w+\.)?encoder\.layer\.\d+", r"(?:\w+\.)*layers\.\d+"
_BERT_REST = {
    **_names(r"o: attention\.output\.dense", r"up: intermediate\.dense", r"down: output\.dense"),
    "norm": rf"(?:{_BERT}\.(?:attention\.)?output|(?:\w+\.)?embeddings)\.LayerNorm",
}
_UNET = r"(?:(?:down|up)_blocks\.\d+|mid_block)\.attentions\.\d+\.transformer_blocks\.\d+"
_LLAMA_NAMES = _names(r"q k v o: self_attn\.{}_proj", r"gate up down: mlp\.{}_proj")
_LLAMA_NORM = rf"{_LLAMA}\.(?:input|post_attention)_layernorm|(?:\w+\.)?norm"
_IN_TORCHVISION = (
    "torchvision's attention reads its weights and never calls them: give targets=(up,down) or timm's model"
)

FAMILIES = [
    # timm
    _timm(r"VisionTransformer(?:RelPos|SAM)?|Beit|Eva|NaFlexVit|Hiera|Cait", _VIT, blocks=_VIT_BLOCK),
    _timm(r"Xcit", _VIT, blocks=_VIT_BLOCK, norm=""),
    _timm(r"SwinTransformer(?:V2)?", _SWIN, reduction=r"layers\.\d+\.downsample\.reduction"),
    _timm(
        r"MaxxVit",
        r"stages\.\d+\.blocks\.\d+\.attn_(?:block|grid)",
        blocks=r"stages\.\d+\.blocks\.\d+",
        norm="",
        embed="",
    ),
    _timm(r"ByobNet", r"stages\.\d+\.\d+\.transformer\.\d+", norm="", embed=""),
    _row(
        r"MlpMixer",
        r"blocks\.\d+",
        head="head",
        note="it has no attention: give targets=(up,down)",
        **_names(r"up: mlp_(?:tokens|channels)\.fc1", r"down: mlp_(?:tokens|channels)\.fc2"),
    ),
    # torchvision, whose classes have timm's names
    _row(
        r"VisionTransformer",
        r"encoder\.layers\.encoder_layer_\d+",
        head="heads",
        note=_IN_TORCHVISION,
        **_names(r"up: mlp\.0", r"down: mlp\.3"),
    ),
    _row(
        r"SwinTransformer",
        r"features\.\d+\.\d+",
        head="head",
        note=_IN_TORCHVISION,
        **_names(r"up: mlp\.0", r"down: mlp\.3"),
    ),
    # transformers: text encoders
    _row(
        r"(?:Bert|Roberta|XLMRoberta|Electra)PreTrainedModel",
        _BERT,
        **_names(r"q: attention\.self\.query", r"k: attention\.self\.key", r"v: attention\.self\.value"),
        **_BERT_REST,
    ),
    _row(
        r"DebertaV2PreTrainedModel",
        _BERT,
        **_names(r"q: attention\.self\.query_proj", r"k: attention\.self\.key_proj", r"v: attention\.self\.value_proj"),
        **_BERT_REST,
    ),
    _row(
        r"DistilBertPreTrainedModel",
        r"(?:\w+\.)?transformer\.layer\.\d+",
        head=rf"pre_classifier|{_HEADS}",
        norm=_NORM,
        **_names(r"q k v: attention\.{}_lin", r"o: attention\.out_lin", r"up: ffn\.lin1", r"down: ffn\.lin2"),
    ),
    _row(
        r"ModernBertPreTrainedModel",
        _LLAMA,
        norm=_NORM,
        **_names(r"qkv: attn\.Wqkv", r"q k v: attn\.Wqkv\.{}", r"o: attn\.Wo"),
        **_names(r"gate_up: mlp\.Wi", r"gate up: mlp\.Wi\.{}", r"down: mlp\.Wo"),
    ),
    # transformers: causal language models
    _row(r"LlamaPreTrainedModel", _LLAMA, head="score", norm=_LLAMA_NORM, **_LLAMA_NAMES),
    _row(r"(?:Mistral|Qwen[23]|Olmo2?|Granite)PreTrainedModel", _LLAMA, norm=_NORM, **_LLAMA_NAMES),
    _row(r"Gemma[23]?PreTrainedModel", _LLAMA, **_LLAMA_NAMES),
    _row(
        r"(?:Mixtral|Qwen[23]Moe)PreTrainedModel",
        _LLAMA,
        norm=_NORM,
        note="its experts are one tensor, not linear layers: give targets=(q,k,v,o)",
        **_LLAMA_NAMES,
    ),
    _row(
        r"Phi3PreTrainedModel",
        _LLAMA,
        norm=_NORM,
        **_names(r"qkv: self_attn\.qkv_proj", r"q k v: self_attn\.qkv_proj\.{}", r"o: self_attn\.o_proj"),
        **_names(r"gate_up: mlp\.gate_up_proj", r"gate up: mlp\.gate_up_proj\.{}", r"down: mlp\.down_proj"),
    ),
    _row(
        r"(?:GPTNeoX|Bloom|Falcon)PreTrainedModel",
        r"(?:\w+\.)?(?:layers|h)\.\d+",
        norm=_NORM,
        **_names(r"qkv: \w*attention\.query_key_value", r"q k v: \w*attention\.query_key_value\.{}"),
        **_names(r"o: \w*attention\.dense", r"up: mlp\.dense_h_to_4h", r"down: mlp\.dense_4h_to_h"),
    ),
    _row(
        r"GPT2PreTrainedModel",
        r"(?:\w+\.)?h\.\d+",
        norm=_NORM,
        **_names(r"qkv: attn\.c_attn", r"q k v: attn\.c_attn\.{}", r"o: attn\.c_proj"),
        **_names(r"up: mlp\.c_fc", r"down: mlp\.c_proj"),
    ),
    # transformers: pictures, pictures with text, sound, text to text
    _row(
        r"(?:ViT|DeiT|Dinov2|DINOv3ViT|Beit)PreTrainedModel",
        r"(?:\w+\.)*layers?\.\d+",
        head=rf"\w*_classifier|{_HEADS}",
        norm=_NORM,
        embed=_EMBED,
        **_names(r"q k v o: attention\.{}_proj", r"gate: mlp\.gate_proj", r"up: mlp\.(?:fc1|up_proj)"),
        **_names(r"down: mlp\.(?:fc2|down_proj)"),
    ),
    _row(
        r"Swin(?:v2)?PreTrainedModel",
        r"(?:\w+\.)?encoder\.layers\.\d+\.blocks\.\d+",
        norm=_NORM,
        embed=_EMBED,
        reduction=r".*\.downsample\.reduction",
        **_names(r"q: attention\.(?:q_proj|self\.query)", r"k: attention\.(?:k_proj|self\.key)"),
        **_names(r"v: attention\.(?:v_proj|self\.value)", r"o: attention\.(?:o_proj|output\.dense)"),
        **_names(r"up: mlp\.fc1|intermediate\.dense", r"down: mlp\.fc2|output\.dense"),
    ),
    _row(
        r"(?:CLIP|Siglip|OPT|Whisper|Bart)PreTrainedModel",
        r"(?:\w+\.)*(?:encoder|decoder)\.layers\.\d+",
        head=rf"projector|{_HEADS}",
        norm=_NORM,
        embed=_EMBED,
        **_names(r"q k v: (?:self|encoder)_attn\.{}_proj", r"o: (?:self|encoder)_attn\.out_proj"),
        **_names(r"up: (?:mlp\.)?fc1", r"down: (?:mlp\.)?fc2"),
    ),
    _row(
        r"Wav2Vec2PreTrainedModel",
        r"(?:\w+\.)?encoder\.layers\.\d+",
        head=rf"projector|{_HEADS}",
        norm=r"(?:\w+\.)?(?:encoder|feature_projection)\.(?:.*\.)?\w*norm",
        **_names(r"q k v: attention\.{}_proj", r"o: attention\.out_proj"),
        **_names(r"up: feed_forward\.intermediate_dense", r"down: feed_forward\.output_dense"),
    ),
    _row(
        r"T5PreTrainedModel",
        r"(?:\w+\.)*(?:encoder|decoder)\.block\.\d+",
        norm=_NORM,
        **_names(r"q k v o: layer\.\d+\.(?:SelfAttention|EncDecAttention)\.{}"),
        **_names(r"gate: layer\.\d+\.DenseReluDense\.wi_0", r"up: layer\.\d+\.DenseReluDense\.wi(?:_1)?"),
        **_names(r"down: layer\.\d+\.DenseReluDense\.wo"),
    ),
    # diffusers: the transformers inside a UNet, self- and cross-attention, and the two halves of GEGLU as one layer
    _row(
        r"UNet2DConditionModel",
        _UNET,
        order=_through_unet,
        norm=rf"{_UNET}\.norm\d",
        **_names(r"q k v: attn[12]\.to_{}", r"o: attn[12]\.to_out\.0", r"up: ff\.net\.0\.proj", r"down: ff\.net\.2"),
    ),
]
