"""The family of a model that no row knows: roles by the usual names of layers, blocks and heads, and by shapes.

A fused projection is found as one layer (qkv, gate_up). In what order its outputs are is not known, so it is not split.
"""

import re
from collections import defaultdict

from torch import nn

from recombine.models.family import Family

ATTENTION = r"(?:.*\.)?(?:\w*att[ne]\w*|\w*mha\w*)(?:\.\w+)*?"
NAMES = {  # role -> regex of a layer's name inside its block
    "qkv": r"(?:.*\.)?(?:qkv|qkv_proj|to_qkv|Wqkv|query_key_value|c_attn|in_proj)",
    "q": r"(?:.*\.)?(?:q|wq|to_q|q_proj|q_lin|query|query_proj)",
    "k": r"(?:.*\.)?(?:k|wk|to_k|k_proj|k_lin|key|key_proj)",
    "v": r"(?:.*\.)?(?:v|wv|to_v|v_proj|v_lin|value|value_proj)",
    "o": rf"(?:.*\.)?(?:o|wo|to_out(?:\.0)?|o_proj|out_proj|out_lin)|{ATTENTION}\.(?:proj|dense|c_proj|Wo)",
    "gate_up": r"(?:.*\.)?(?:gate_up_proj|Wi)",
    "gate": r"(?:.*\.)?(?:gate|gate_proj|fc1_g|wi_0)",
    "up": r"(?:.*\.)?(?:fc1|up|up_proj|fc1_x|wi|wi_1|c_fc|fc_in|lin1|linear1|intermediate_dense|dense_h_to_4h)"
    r"|(?:.*\.)?intermediate\.dense",
    "down": r"(?:.*\.)?(?:fc2|down|down_proj|fc_out|lin2|linear2|output_dense|dense_4h_to_h)"
    rf"|(?!{ATTENTION}\.)(?:.*\.)?(?:output\.dense|c_proj|wo|Wo)",
}
HEAD = r"classifier|score|head|fc|heads|classification_head|qa_outputs|\w+_classifier"


def infer(model: nn.Module, layers: dict[str, nn.Module]) -> Family | None:
    """The family that names and shapes speak for; None: the model has no linear layers in numbered blocks.

    Args:
        layers: the linear layers and what stands for one, by module name.
    """
    blocks = block_pattern(layers)
    if blocks is None:
        return None
    inner = {name: re.sub(rf"^{blocks}\.", "", name) for name in layers if re.match(rf"{blocks}\.", name)}
    roles: dict[str, set[str]] = defaultdict(set)
    known = set()
    for name, rest in inner.items():
        if role := role_by_name(rest):
            roles[role].add(rest)
            known.add(name)
    for name, role in by_shape({name: layers[name] for name in inner.keys() - known}).items():
        roles[role].add(inner[name])
    patterns = {
        role: rf"{blocks}\.(?:{'|'.join(sorted(map(re.escape, roles[role])))})" for role in NAMES if roles.get(role)
    }
    return Family(classes=type(model).__name__, roles=patterns, blocks=blocks, head=HEAD)


def block_pattern(layers: dict[str, nn.Module]) -> str | None:
    """The blocks: the numbered modules that hold most linear layers, the innermost where several hold as many."""
    held: dict[str, list[str]] = defaultdict(list)
    for name in layers:
        for end in re.finditer(r"\.\d+(?=\.)", name):
            held[re.sub(r"\d+", r"\\d+", name[: end.end()].replace(".", r"\."))].append(name)
    repeated = {p: names for p, names in held.items() if len({re.match(p, name)[0] for name in names}) > 1}
    candidates = repeated or held
    if not candidates:
        return None
    most = max(map(len, candidates.values()))
    best = max(
        (p for p, names in candidates.items() if 2 * len(names) >= most and kinds(p, names) > 1), default=None, key=len
    )
    return best or max(candidates, key=lambda p: len(candidates[p]))


def kinds(pattern: str, names: list[str]) -> int:
    """How many different layers there are inside a block."""
    return len({re.sub(rf"^{pattern}\.", "", name) for name in names})


def role_by_name(rest: str) -> str | None:
    """The role of a layer by its name inside its block."""
    return next((role for role, pattern in NAMES.items() if re.fullmatch(pattern, rest)), None)


def by_shape(layers: dict[str, nn.Module]) -> dict[str, str]:
    """up and down: the two linear layers of one module, of which the first widens and the second comes back."""
    families: dict[str, list[str]] = defaultdict(list)
    for name in sorted(layers):
        families[name.rpartition(".")[0]].append(name)
    found = {}
    for names in families.values():
        if len(names) == 2:
            up, down = (layers[name] for name in names)
            if (up.in_features, up.out_features) == (down.out_features, down.in_features) != (up.in_features,) * 2:
                found |= dict(zip(names, ("up", "down"), strict=True))
    return found
