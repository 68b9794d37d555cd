"""Where the configuration lies. It stands beside the package in a clone, and is no part of a wheel."""

from pathlib import Path

from recombine.errors import UsageError

CONF = Path(__file__).parents[2] / "conf"


def need_clone(what: str) -> None:
    """Raises UsageError where the package is not in a clone."""
    if not (CONF / "config.yaml").is_file():
        raise UsageError(f"{what}: reads conf/, which no wheel brings; clone the project and `pip install -e .` there")
