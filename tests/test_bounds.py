"""The versions that pyproject.toml allows begin where the tests run: at those of requirements.lock."""

import re
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from helpers import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LINES = [*PROJECT["dependencies"], *sum(PROJECT["optional-dependencies"].values(), [])]
PINS = {
    canonicalize_name(pin.name): Version(next(iter(pin.specifier)).version)
    for pin in map(
        Requirement, re.findall(r"^[\w.-]+==[\d.]\S*", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    )
}


@pytest.mark.parametrize("line", LINES)
def test_a_lower_bound_is_what_is_tested(line):
    """Up to the second number, or to the third where one of the first two is 0: there a third brings new functions."""
    wanted = Requirement(line)
    pin = PINS[canonicalize_name(wanted.name)]
    assert pin in wanted.specifier, f"{line}: the lock has {pin}"
    lowest = max(Version(s.version.removesuffix(".*")) for s in wanted.specifier if s.operator in (">=", "=="))
    deep = 3 if 0 in pin.release[:2] and "*" not in line else 2
    assert lowest.release[:deep] == pin.release[:deep], f"{line}: nothing below {pin} is tested"
