"""The names and values that may reach the constructors of timm and transformers, from a command line or from a file.

Both libraries also take paths, names of code and callables there, such as ``checkpoint_path`` or ``auto_map``. A
checkpoint that somebody else made must not say those. So a timm model takes the names below, a transformers model what
its own configuration class declares, and every value is plain: a number, a word, true, false, null, or a list of these.
"""

import math
import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from recombine.errors import UsageError

LARGEST = 2**24  # of a size: of a vocabulary, a width or a number of positions
DEEPEST = 4096  # of a count: of blocks, heads or stages
TIMM_COUNTS = {
    "cls_attn_layers",
    "depth",
    "depth_token_only",
    "depths",
    "num_blocks",
    "num_heads",
    "num_kv_heads",
    "stages",
}
TIMM = TIMM_COUNTS | set(  # of the constructors of its transformers
    """
    abs_win_pos_embed always_partition attn_only_layer_scale attn_pool_mlp_ratio attn_pool_num_heads attn_type
    class_token cls_attn_layers dim_mul drop_rate dynamic_img_pad dynamic_img_size embed_dim eta fc_norm final_norm
    fix_init global_attn_indexes global_pool global_pos_size head_dim head_hidden_size head_init_scale head_mul
    init_values
    mask_unit_attn mask_unit_size mlp_ratio mlp_ratio_token_only neck_chans nlhb no_embed_class num_reg_tokens
    patch_drop_rate patch_kernel patch_padding patch_size patch_stride pool_include_prefix pos_drop_rate pos_embed
    pre_norm pretrained_window_sizes proj_bias proj_drop_rate q_pool q_stride qk_norm qkv_bias qkv_fused ref_feat_shape
    reg_tokens rel_pos_dim rel_pos_type rope_grid_indexing rope_grid_offset rope_rotate_half rope_temperature rope_type
    scale_attn_inner scale_attn_norm scale_mlp scale_mlp_norm sep_pos_embed shared_rel_pos stem_norm strict_img_size
    swiglu_align_to swiglu_mlp tokens_norm use_abs_pos use_abs_pos_emb use_expand_proj use_fc_norm use_pos_embed
    use_post_norm use_post_transformer_norm use_pre_transformer_norm use_rel_pos use_rel_pos_bias use_rope
    use_rot_pos_emb use_shared_rel_pos_bias weight_init window_size
    """.split()  # noqa: SIM905
)
COUNTS = re.compile(r"(?:num|n)_.*(?:layers?|heads?|blocks?|experts?|stages)|depths?|.*_layers")
NEVER = re.compile(r"_.*|.*(?:auto_map|backbone|pretrained|quantization|name_or_path|checkpoint|torchscript).*")
WORD = re.compile(r"(?:[\w.+-]|\\\.){0,120}")  # no path, nothing to import; peft's patterns write a dot as \\.


def timm_arguments(values: Mapping[str, Any]) -> None:
    """Checks further arguments of a timm model.

    Raises:
        UsageError: names the first that is unknown or holds no plain value.
    """
    for key, value in values.items():
        if key not in TIMM:
            near = ", ".join(get_close_matches(str(key), TIMM, 3)) or "those of recombine/models/allowed.py"
            raise UsageError(f"model.{key}={value!r}: no size of a timm model; drop it, or take one of {near}")
        refuse(f"model.{key}", value, DEEPEST if key in TIMM_COUNTS else LARGEST)


def config_values(config_class: type, values: Mapping[str, Any], also: Iterable[str] = ()) -> None:
    """Checks entries of a transformers configuration.

    Args:
        also: names that the class reads without declaring them.

    Raises:
        UsageError: names the first that the class does not declare, that names code or files, or that is not plain.
    """
    declared = {*config_class().to_dict(), *also}
    for key, value in values.items():
        if key not in declared or NEVER.fullmatch(key):
            raise UsageError(f"model.{key}={value!r}: {config_class.__name__} has no such key; drop it")
        if key == "model_args" and isinstance(value, Mapping):  # of a timm model inside
            timm_arguments({name: x for name, x in value.items() if name not in ("img_size", "drop_path_rate")})
        labels = key in ("id2label", "label2id") and isinstance(value, Mapping)
        if not labels or not all(str(part).isprintable() for pair in value.items() for part in pair):
            refuse(f"model.{key}", value, DEEPEST if COUNTS.fullmatch(key) else LARGEST)


def refuse(key: str, value: Any, largest: int, depth: int = 0) -> None:
    """Refuses a value that is not plain.

    Args:
        key: as the user typed it.
        largest: of a whole number.

    Raises:
        UsageError: it is no finite number, word, true, false, null, or list or group of these.
    """
    if value is None or isinstance(value, bool):
        return
    if isinstance(value, int) and abs(value) > largest:
        raise UsageError(f"{key}={str(value)[:40]}: too large; take at most {largest}")
    if isinstance(value, int) or isinstance(value, float) and math.isfinite(value):
        return
    if isinstance(value, str) and WORD.fullmatch(value):
        return
    parts = [*value.values(), *value] if isinstance(value, Mapping) else value
    if not isinstance(parts, list | tuple) or depth == 4:
        shown = repr(value)[:80]
        raise UsageError(f"{key}={shown}: no plain value; take a finite number, a word, true, false, null or a list")
    for part in parts:
        refuse(key, part, largest, depth + 1)
