"""The folder of a run: the configuration that is kept there, and what the run is called by it."""

from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from recombine.runtime.atomic import atomic_write
from recombine.training import distributed


def keep_configuration(cfg: DictConfig, out: Path) -> None:
    """Writes .hydra as Hydra would; it would before a run is refused, over the .hydra of one that has finished."""
    if HydraConfig.initialized() and distributed.rank() == 0:
        hydra = HydraConfig.instance().cfg
        for name, part in (("config", cfg), ("hydra", hydra), ("overrides", hydra.hydra.overrides.task)):
            with atomic_write(out / ".hydra" / f"{name}.yaml") as temporary:
                OmegaConf.save(part, temporary)


def name(out: Path) -> str:
    """What a logger calls a run, in 128 characters at most: the folder's name, of a suite's task after the suite's."""
    return (f"{out.parent.name}/{out.name}" if of_suite(out) else out.name)[-128:]


def of_suite(out: Path) -> bool:
    """Whether the folder is that of one task of a suite."""
    return HydraConfig.initialized() and out != Path(HydraConfig.get().runtime.output_dir)


def group(out: Path) -> str | None:
    """What a run is one of: its experiment, the folder of its sweep, or its suite; None of a single run without one."""
    if not HydraConfig.initialized():
        return None
    hydra = HydraConfig.get()
    if experiment := hydra.runtime.choices.get("experiment"):
        return experiment
    if not OmegaConf.is_missing(hydra.job, "num"):  # numbered: one of several
        return "/".join(Path(hydra.runtime.output_dir).parts[-3:-1])
    return out.parent.name if of_suite(out) else None
