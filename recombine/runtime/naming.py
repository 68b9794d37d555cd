"""Folders of runs and sweeps: named after what was asked for, so that no two runs of a sweep collide."""

import hashlib
import re
from collections.abc import Iterable

from omegaconf import OmegaConf

# choose which runs, where they go and what is shown; not what comes out
ASIDE = ("experiment", "only", "retry", "grid", "report", "logger", "trainer.progress")


def run_name(overrides: str) -> str:
    """The overrides as a folder name; changed or long ones keep their hash. No overrides: "default"."""
    name = re.sub(r"[^a-zA-Z0-9_.=,+-]", "_", overrides) or "default"
    if name == (overrides or "default") and len(name) <= 120:
        return name
    return f"{name[:110]}-{hashlib.sha256(overrides.encode()).hexdigest()[:8]}"


def run_folder(overrides: Iterable[str]) -> str:
    """The folder of a run; the order of its overrides does not matter."""
    return run_name(",".join(sorted(o for o in overrides if not aside(o.lstrip("+~").split("=")[0]))))


def aside(key: str) -> bool:
    """Whether a key of the configuration leaves the result as it is."""
    return any(key == name or key.startswith(name + ".") for name in ASIDE)


def sweep_folder(experiment: str | None, now: str) -> str:
    """The folder of a sweep. An experiment has one, where a second call finds what is done; others carry the time."""
    return f"outputs/{experiment}" if experiment else f"outputs/{now}-sweep"


for resolver in (run_folder, sweep_folder):
    OmegaConf.register_new_resolver(resolver.__name__, resolver, replace=True)
OmegaConf.register_new_resolver("sweep_mode", lambda grid: "MULTIRUN" if grid else None, replace=True)
