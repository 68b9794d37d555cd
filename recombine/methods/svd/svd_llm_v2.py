"""How SVD-LLM v2 shares one budget out among the layers of a role (arXiv 2503.12340, Sec. 3.1).

Of L layers that lose a share R of their weights each, layer l loses

    R_l = L R (1 / ln E_l) / sum_j (1 / ln E_j),    E_l = |sigma_{> k}|,

with E_l what it loses of its spectrum at the rank k of R. Paper: nothing is said of E_l <= 1, whose logarithm is
negative, nor of R_l > 1. Here: ln(1 + E_l), as in LowRankArena's code; what is beyond 1 the other layers of the role
lose. The formula depends on the scale of the weights and of the inputs.
"""

import math
from collections import defaultdict
from collections.abc import Sequence


def shares(roles: Sequence[str], errors: Sequence[float], ratio: float) -> list[float]:
    """The share of its weights that every layer keeps.

    Args:
        roles, errors: of the layers; an error is E_l.
        ratio: 1 - R.
    """
    kept, by_role = [0.0] * len(roles), defaultdict(list)
    for i, role in enumerate(roles):
        by_role[role].append(i)
    for layers in by_role.values():
        inverse = {i: 1 / max(math.log(e) if (e := errors[i]) > 1 else math.log1p(e), 1e-9) for i in layers}
        lost = (1 - ratio) * len(layers)
        while inverse:
            scale = lost / sum(inverse.values())
            whole = [i for i, value in inverse.items() if scale * value > 1]
            if not whole:
                kept = [1 - scale * inverse[i] if i in inverse else value for i, value in enumerate(kept)]
                break
            lost -= len(whole)  # they keep nothing but a first rank
            for i in whole:
                del inverse[i]
    return kept
