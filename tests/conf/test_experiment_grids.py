"""The composed experiments are those that were recorded: settings, cells and report, whatever file a line stands in.

tests/conf/experiments.sha256 has one line an experiment. A change that means to change one renews the file:

    python tests/conf/test_experiment_grids.py > tests/conf/experiments.sha256
"""

import hashlib
import json
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import recombine.runtime.naming  # noqa: F401  resolvers that the configuration uses
from recombine import results
from recombine.runner import grid
from recombine.runtime.naming import aside

RECORDED = Path(__file__).with_name("experiments.sha256")
ORDERED = ("values", "extra", "means", "plots")  # of a report: the order is that of columns and pictures


def settings() -> set[str]:
    """The keys of conf/config.yaml; an experiment's others (rates, sets) only serve its grid and its report."""
    with initialize_config_dir(str(grid.CONF), version_base="1.3"):
        return {key for key in compose("config", []) if key != "hydra" and not aside(key)}


def digest(experiment: grid.Experiment, known: set[str]) -> str:
    """The hash of everything that an experiment composes to."""
    config = OmegaConf.masked_copy(experiment.config, sorted(known & set(experiment.config)))
    config._set_parent(experiment.config)  # interpolations may refer to what is left out
    report = experiment.report
    parts = [
        results.canonical(OmegaConf.to_container(config, resolve=True)),
        [[list(cell.labels.items()), sorted(cell.overrides), cell.folder] for cell in experiment.cells],
        report,
        {key: list(report[key]) for key in ORDERED if report.get(key)},
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def composed() -> dict[str, str]:
    """The hash of every experiment that has a grid or a report; the others are what these share."""
    known, paths = settings(), sorted(grid.CONF.glob("experiment/**/*.yaml"))
    experiments = [grid.load(str(path.relative_to(grid.CONF / "experiment"))[:-5]) for path in paths]
    return {found.name: digest(found, known) for found in experiments if found.grid and found.report}


@pytest.fixture(scope="module")
def hashes() -> dict[str, str]:
    return composed()


def recorded() -> dict[str, str]:
    return dict(line.split()[::-1] for line in RECORDED.read_text().splitlines())


def test_the_experiments_are_those_recorded(hashes):
    assert set(hashes) == set(recorded())


@pytest.mark.parametrize("name", sorted(recorded()))
def test_an_experiment_is_as_recorded(name, hashes):
    assert hashes[name] == recorded()[name], f"{name} composes to something else; see the head of this file"


if __name__ == "__main__":
    sys.stdout.writelines(f"{sha}  {name}\n" for name, sha in sorted(composed().items()))
