"""The layout: a module imports only what lies on floors below its own, and no modules import each other in a circle."""

import ast
import re
from pathlib import Path

import pytest

from helpers import ROOT

FLOORS = (  # docs/design.md; a floor imports only floors below it
    ("errors", "linalg", "layers"),
    ("runtime", "result_schema"),
    ("models", "data", "results"),
    ("core",),
    ("methods", "export"),
    ("training", "api"),
    ("evaluation",),
    ("stages",),
    ("runner",),
    ("run", "report", "hydra_plugins"),
    ("scripts", "examples"),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {
    module_name(path): path
    for path in [
        ROOT / "run.py",
        *(p for folder in ("recombine", "hydra_plugins", "scripts", "examples") for p in (ROOT / folder).rglob("*.py")),
    ]
}


def room(module: str) -> str:
    """recombine.data.vision.base -> data; what is not in the package is a room by its first name."""
    parts = module.split(".")
    return parts[1] if parts[0] == "recombine" and len(parts) > 1 else parts[0]


def imports(path: Path) -> set[str]:
    """Every module of the project that a file imports, at its top or in a function; what only type checkers read is
    left out."""
    tree = ast.parse(path.read_text())
    typing = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.dump(block.test)
        for node in ast.walk(block)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in typing:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
    return {name for name in found if name in MODULES}


GRAPH = {name: imports(path) - {name, "recombine"} for name, path in MODULES.items()}


def test_every_module_is_in_a_room_of_the_plan():
    assert {room(name) for name in MODULES} - {"recombine"} == set(FLOOR)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_point_down(name):
    if name == "recombine":  # what it offers is imported at first use
        return
    upward = [other for other in GRAPH[name] if room(other) != room(name) and FLOOR[room(other)] >= FLOOR[room(name)]]
    assert not upward, f"{name} is on floor {FLOOR[room(name)] + 1} and imports {', '.join(sorted(upward))}"


def test_no_modules_import_each_other():
    def reach(start: str) -> set[str]:
        seen, todo = set(), list(GRAPH[start])
        while todo:
            if (name := todo.pop()) not in seen:
                seen.add(name)
                todo += GRAPH[name]
        return seen

    assert not sorted(name for name in GRAPH if name in reach(name))


def test_modules_and_functions_are_short():
    """At most 250 lines a module and 50 lines a function."""
    long = []
    for name, path in MODULES.items():
        text = path.read_text()
        if text.count("\n") > 250:
            long.append(f"{name}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and (length := node.end_lineno - node.lineno + 1) > 50:
                long.append(f"{name}.{node.name}: {length} lines")
    assert not long


def test_nothing_below_the_runner_reads_the_whole_configuration():
    below = {name for name in MODULES if room(name) in FLOOR and FLOOR[room(name)] < FLOOR["runner"]}
    whole = re.compile(r"HydraConfig|(?<!\w)cfg[.\[]")
    readers = {name for name in below if whole.search(MODULES[name].read_text())}
    assert readers <= {"recombine.methods.from_config"}  # one node of it: a method's


def test_the_rule_is_seen_to_be_broken(tmp_path):
    """The reader of imports sees a late import, and takes none that only type checkers read."""
    file = tmp_path / "module.py"
    file.write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from recombine.report import page\n"
        "def f():\n    from recombine.runner import grid\n    import recombine.stages.adapt\n"
    )
    assert imports(file) == {"recombine.runner.grid", "recombine.stages.adapt"}


def test_what_is_public_begins_with_a_summary():
    """Every public class and function of a module has a docstring whose first line says what it is."""
    silent = []
    for name, path in MODULES.items():
        if name.partition(".")[0] != "recombine":
            continue
        for node in ast.parse(path.read_text()).body:
            public = isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_")
            if public and (ast.get_docstring(node) or "Args").startswith(("Args", "Raises:", "Returns:")):
                silent.append(f"{name}.{node.name}")
    assert not silent
