"""Fields of CRISP that are null where nobody says what they are: the best known, with or without a budget.

The evidence: experiments/crisp/start.md, experiments/compressors/README.md. No torch here: results need it too.
"""

OPEN = (  # at the exact size, and where a budget limits what is stored
    {"chunk": 32, "group_size": 2, "fit": "closed"},
    {"chunk": 128, "group_size": 1, "fit": "aware"},
)


def decided(keys: dict, limited: bool) -> dict:
    """The fields of CRISP that are null, as `Crisp.settled` decides them.

    Args:
        keys: flat. limited: a budget limits what the compressor stores, or else the method where there is no other.
    """
    pair = any(key.startswith("compressor.") for key in keys)
    found = {}
    for slot in ("method", "compressor"):
        values = OPEN[limited and (slot == "compressor" or not pair)]
        if keys.get(f"{slot}._target_") == "recombine.Crisp":
            found |= {key: v for name, v in values.items() if keys.get(key := f"{slot}.{name}", 0) is None}
    return found
