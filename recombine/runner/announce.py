"""The first line of a run. It comes before torch is imported, which takes seconds."""

import os
import sys
from collections.abc import Mapping

from recombine.runtime.progress import wrapped


def say_what_loads(cfg: Mapping, choices: Mapping[str, str | None], cores: str | None = None) -> None:
    """The first line of a run, on stderr, while torch is still to be imported.

    Args:
        cfg: the composed configuration.
        choices: configuration group -> what was chosen of it, as the user typed it.
        cores: how many of them torch takes, in words; None: all.
    """
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    if not cfg["trainer"]["progress"] or rank != "0":
        return
    method = " after ".join(part for part in (choices.get("method"), choices.get("method@compressor")) if part)
    data, task = choices["data"], cfg["data"].get("task")
    stage = f"{'plan of ' if cfg.get('plan') is not None else ''}stage {cfg['stage']['name']}"
    line = (
        f"{method} on {choices['model']}, data {data}{f' ({task})' if task else ''}, "
        f"{stage}{f', {cores}' if cores else ''}: loading torch ..."
    )
    print(f"recombine: {wrapped(line, 11, sys.stderr)}", file=sys.stderr, flush=True)
