"""A rank that some layers are too narrow for: they take as much as they have.

One that fits no layer is refused.
"""

from collections.abc import Mapping

from recombine.core.method import Method, Site, need


def check_rank(method: Method, widths: Mapping[str, int], least: int = 1) -> None:
    """Checks the method's rank.

    Args:
        widths: the largest rank that each layer can have, by its name.
        least: the smallest rank.

    Raises:
        UsageError: it is below `least`, or no layer can have it.
    """
    most = max(widths.values())
    need(least <= method.rank <= most, method, "rank", f"must be from {least} to {most}, the widest target layer")


def rank_notes(method: Method, widths: Mapping[str, int]) -> list[str]:
    """What `Method.notes` says of the rank. widths: as in `check_rank`."""
    narrow = {name: width for name, width in widths.items() if method.rank is not None and width < method.rank}
    if not narrow:
        return []
    name, least = min(narrow.items(), key=lambda item: item[1])
    count = f"{len(narrow)} of {len(widths)} layers"
    return [f"method.rank={method.rank}: {count} are narrower and have their full rank, {name} the least, {least}"]


def widths(sites: list[Site]) -> dict[str, int]:
    """The largest rank of every layer, by its name. No weight of a compressed layer is built for it."""
    return {site.name: min(site.module.in_features, site.module.out_features) for site in sites}
