"""Keys that the command line adds with `+` or `++`: Hydra adds whatever is typed, and nothing would read it.

What can be read stands in the configuration that the same choices of groups compose to. This imports no torch.
"""

from collections.abc import Iterable, Iterator, Sequence

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from recombine.errors import UsageError, unknown_key
from recombine.runner.arguments import options
from recombine.runner.quoting import parse
from recombine.runtime import help
from recombine.runtime.conf import CONF

# Nodes whose keys are those of a class, or of anything: who reads them refuses what it does not know.
OPEN = (
    *("method", "compressor", "model", "data", "calibration.data", "stage.reference", "trainer.strategy"),
    *("grid", "report", "hydra.launcher.additional_parameters", "hydra.sweeper.params", "hydra.job.env_set"),
)


def refuse_unread(overrides: Iterable[str]) -> None:
    """Refuses `+optim.momentum=0.9`, at every depth, where nothing reads such a key.

    Args:
        overrides: the command line's, as Hydra reads them.

    Raises:
        UsageError: names the key and those that are near.
    """
    parsed = [parse(override) for override in overrides]
    groups = tuple(f"{o.key_or_group}." for o in parsed if o.is_sweep_override() and is_group(o.key_or_group))
    if not (added := [o for o in parsed if o.input_line.startswith("+") or o.key_or_group.startswith(groups)]):
        return
    bases = None
    for override in added:
        key = override.key_or_group
        if is_group(key):
            raise UsageError(f"{override.input_line}: say {override.input_line.lstrip('+')}, without +")
        if override.input_line.startswith("+") and key.startswith(tuple(f"{node}." for node in OPEN)):
            continue
        bases = bases or list(compositions([o for o in parsed if is_group(o.key_or_group)]))
        if not any(holds(base, key) for base in bases):
            raise UsageError(unknown_key(override.input_line, key, bases[0]))


def is_group(key: str) -> bool:
    """Whether it names a group of conf/: a choice, not a key."""
    return key in help.groups() or (CONF / key).is_dir()


def holds(config: DictConfig, key: str) -> bool:
    """Whether the configuration has the key, be it null."""
    node, _, last = key.rpartition(".")
    parent = OmegaConf.select(config, node) if node else config
    return isinstance(parent, DictConfig) and last in parent


def compositions(choices: Sequence[Override]) -> Iterator[DictConfig]:
    """The configurations of these choices of groups, without any key of the command line.

    A choice that is swept over gives one for each of its words, beside the first words of the others.
    """
    words = [[f"{o.get_key_element()}={value}" for value in options(o)] or [o.input_line] for o in choices]
    first = [known[0] for known in words]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield compose("config", first, return_hydra_config=True)
        for i, known in enumerate(words):
            for other in known[1:]:
                yield compose("config", [*first[:i], other, *first[i + 1 :]], return_hydra_config=True)
