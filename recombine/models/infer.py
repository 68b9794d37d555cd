"""The family of a model that no row knows: roles by the usual names of layers, blocks and heads, and by shapes.

A fused projection is found as one layer (qkv, gate_up). In what order its outputs are is not known, so it is not split.
"""

import re
from collections import Counter, defaultdict

from torch import nn

from recombine.models.family import Family

_ATTENTION = r"(?:.*\.)?(?:\w*att[ne]\w*|\w*mha\w*)(?:\.\w+)*?"
ATTENTION = {  # role -> regex of a layer's name inside its block
    "qkv": r"(?:.*\.)?(?:qkv|qkv_proj|to_qkv|Wqkv|query_key_value|c_attn|in_proj)",
    "q": r"(?:.*\.)?(?:q|wq|to_q|q_proj|q_lin|query|query_proj)",
    "k": r"(?:.*\.)?(?:k|wk|to_k|k_proj|k_lin|key|key_proj)",
    "v": r"(?:.*\.)?(?:v|wv|to_v|v_proj|v_lin|value|value_proj)",
    "o": rf"(?:.*\.)?(?:o|to_out(?:\.0)?|o_proj|out_proj|out_lin)|{_ATTENTION}\.(?:proj|dense|c_proj|[wW]o)",
}
MLP = {
    "gate_up": r"(?:.*\.)?(?:gate_up_proj|Wi)",
    "gate": r"(?:.*\.)?(?:gate|gate_proj|fc1_g|wi_0)",
    "up": r"(?:.*\.)?(?:fc1|up|up_proj|fc1_x|wi|wi_1|c_fc|fc_in|lin1|linear1|intermediate[._]dense|dense_h_to_4h)",
    "down": r"(?:.*\.)?(?:fc2|down|down_proj|c_proj|[wW]o|fc_out|lin2|linear2|output[._]dense|dense_4h_to_h)",
}
HEAD = r"classifier|score|head|fc|heads|classification_head|qa_outputs|\w+_classifier"


def infer(model: nn.Module, layers: dict[str, nn.Module]) -> Family | None:
    """The family that names and shapes speak for; None: the model has no linear layers in numbered blocks.

    Args:
        layers: the linear layers and what stands for one, by module name.
    """
    if not (patterns := block_patterns(list(layers))):
        return None
    blocks = f"(?:{'|'.join(patterns)})" if len(patterns) > 1 else patterns[0]
    inner = {name: re.sub(rf"^{blocks}\.", "", name) for name in layers if re.match(rf"{blocks}\.", name)}
    found = {name: role_by_name(rest) for name, rest in inner.items()}
    rest = {name: layers[name] for name, role in found.items() if role is None and not in_attention(inner[name])}
    found |= by_shape(rest)
    roles = {
        role: rf"{blocks}\.(?:{'|'.join(sorted({re.escape(inner[n]) for n, r in found.items() if r == role}))})"
        for role in (*ATTENTION, *MLP)
        if role in found.values()
    }
    return Family(classes=type(model).__name__, roles=roles, blocks=blocks, head=HEAD)


def block_patterns(layers: list[str]) -> list[str]:
    """Regular expressions for the blocks: numbered modules, several of a kind, that hold the same linear layers.

    Those that hold most layers come first, the outermost of those that hold as many. Further ones are of layers that
    the first do not hold: a second tower, a decoder.
    """
    held: dict[str, list[str]] = defaultdict(list)
    for name in layers:
        for end in re.finditer(r"\.\d+(?=\.)", name):
            held[re.sub(r"\d+", r"\\d+", re.escape(name[: end.end()]))].append(name)
    taken: set[str] = set()
    patterns: list[str] = []
    for pattern in sorted(held, key=lambda p: (not alike(p, held[p]), -len(held[p]), len(p))):
        if taken.isdisjoint(held[pattern]) and (not patterns or alike(pattern, held[pattern])):
            patterns.append(pattern)
            taken.update(held[pattern])
    return patterns


def alike(pattern: str, names: list[str]) -> bool:
    """Whether there are several blocks of more than one layer, and most hold the same layers."""
    contents: dict[str, list[str]] = defaultdict(list)
    for name in names:
        block = re.match(pattern, name)[0]
        contents[block].append(name.removeprefix(block))
    kind, count = Counter(map(tuple, contents.values())).most_common(1)[0]
    return count > 1 and 2 * count > len(contents) and len(kind) > 1


def role_by_name(rest: str) -> str | None:
    """The role of a layer by its name inside its block."""
    known = ATTENTION if in_attention(rest) else ATTENTION | MLP
    return next((role for role, pattern in known.items() if re.fullmatch(pattern, rest)), None)


def in_attention(rest: str) -> bool:
    """Whether the layer of that name inside its block is part of an attention."""
    return re.match(rf"{_ATTENTION}\.", rest) is not None


def by_shape(layers: dict[str, nn.Module]) -> dict[str, str]:
    """up and down: the two linear layers of one module, of which the first widens and the second comes back.

    Of three, w1 w2 w3 are gate, down and up, as Llama's authors call them.
    """
    holders: dict[str, list[str]] = defaultdict(list)
    for name in sorted(layers):
        holders[name.rpartition(".")[0]].append(name)
    found = {}
    for names in holders.values():
        first, last = layers[names[0]], layers[names[-1]]
        if [name.rpartition(".")[2] for name in names] == ["w1", "w2", "w3"]:
            found |= dict(zip(names, ("gate", "down", "up"), strict=True))
        elif len(names) == 2 and first.in_features == last.out_features < first.out_features == last.in_features:
            found |= dict(zip(names, ("up", "down"), strict=True))
    return found
